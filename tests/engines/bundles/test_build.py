"""Bundles: what is in them, what verify proves, and that no altered byte is read."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from coatrt.adapter.adapter import Adapter
from coatrt.bundle import Bundle, seal
from coatrt.devices.profiles import device_profile
from coatrt.engines.builders.builder import EngineShapes
from coatrt.engines.bundles.build import build
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.verify import TOLERANCE, verify
from coatrt.engines.measure.bench import bench, bench_text, overheads, percentiles
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.ort import OrtDecoder
from coatrt.errors import BuildError, BundleError, CheckpointError, ConfigError, FormatError
from coatrt.planning import planner
from coatrt.planning.plan import PlanRequest
from coatrt.system.json_data import to_data
from support.bundles import make_bundle
from support.seals import alter_sealed, seal_text
from support.tiny import lora_elements, save_tiny_llama


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_verify_compares_with_torch_and_shows_a_live_lora(tiny_bundle: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    report = verify(Bundle.open(tiny_bundle), progress=lambda done, total, stage, *_: seen.append((done, total, stage)))
    assert list(dict.fromkeys(stage for _, _, stage in seen)) == [
        "hashes",
        "graphs",
        "LoRA",
        "decoding on the CPU",
        "loading the model",
        "weights",
        "decoding on the GPU",
    ]
    assert (report.weights, report.weights, "weights") in seen
    assert report.torch_difference is not None
    assert report.torch_difference <= TOLERANCE / 10
    assert report.lora_effect > 0.01
    assert report.files == len(Bundle.open(tiny_bundle).manifest["files"])
    assert "hashes match" in report.text()
    assert to_data(report)["tolerance"] == TOLERANCE


def test_every_file_is_guarded(copy: Path) -> None:
    names = list(json.loads((copy / "manifest.json").read_text())["files"])
    assert {
        "base.onnx",
        "cpu.onnx",
        "cuda.onnx",
        "weights.bin",
        "hypernet.onnx",
        "hypernet.json",
        "lora.safetensors",
        "lora_io.json",
        "configuration.json",
        "plan.json",
        "chat.json",
    } <= set(names)
    for name in names:
        path = copy / name
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(BundleError, match="was altered"):
            verify(Bundle.open(copy))
        path.write_bytes(data[:-1])
        with pytest.raises(BundleError, match="the manifest says"):
            Bundle.open(copy)
        path.unlink()
        with pytest.raises(BundleError, match=f"lacks {name}"):
            Bundle.open(copy)
        path.write_bytes(data)
    verify(Bundle.open(copy), numbers=False)
    (copy / "extra").write_text("x")
    with pytest.raises(BundleError, match="extra, not in the manifest"):
        verify(Bundle.open(copy))


def test_nothing_is_read_that_the_manifest_does_not_name(copy: Path, tmp_path: Path) -> None:
    tokenizer, elsewhere = copy / "tokenizer", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "evil.jinja").write_text("{{ 'evil' }}")
    assert Bundle.open(copy).folder("tokenizer") == tokenizer
    for planted, plant in (
        ("tokenizer/planted.jinja", lambda path: path.write_text("x")),
        ("tokenizer/chat_templates/evil.jinja", lambda path: path.write_text("x")),
        ("tokenizer/linked.jinja", lambda path: path.symlink_to(elsewhere / "evil.jinja")),
        ("tokenizer/dangling.jinja", lambda path: path.symlink_to(elsewhere / "none")),
        ("tokenizer/chat_templates", lambda path: path.symlink_to(elsewhere)),
    ):
        (copy / planted).parent.mkdir(exist_ok=True)
        plant(copy / planted)
        for check in (Bundle.check_all, lambda bundle: bundle.folder("tokenizer")):
            with pytest.raises(BundleError, match=rf"contains (links \()?{planted}"):
                check(Bundle.open(copy))
        (copy / planted).unlink()
        if (tokenizer / "chat_templates").is_dir():
            (tokenizer / "chat_templates").rmdir()
    (copy / "more").symlink_to(elsewhere)  # outside the tokenizer's folder
    with pytest.raises(BundleError, match=r"contains links \(more\)"):
        verify(Bundle.open(copy))
    (copy / "more").unlink()
    with pytest.raises(BundleError, match="has no more/"):
        Bundle.open(copy).folder("more")
    tokenizer.rename(elsewhere / "tokenizer")
    tokenizer.symlink_to(elsewhere / "tokenizer")
    with pytest.raises(BundleError, match="a link that leaves the bundle"):
        Bundle.open(copy)
    tokenizer.unlink()
    (elsewhere / "tokenizer").rename(copy / "moved")
    tokenizer.symlink_to("moved")
    with pytest.raises(BundleError, match=r"contains links \(tokenizer\)"):
        Bundle.open(copy).folder("tokenizer")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 99}, "bundle format 99"),
        ({"files": {"../../etc/passwd": {"sha256": "0", "bytes": 1}}}, "leaves the bundle"),
        ({"files": {"/etc/passwd": {"sha256": "0", "bytes": 1}}}, "leaves the bundle"),
        ({"files": []}, "lacks files"),
        ({"files": {"cpu.onnx": {}}}, "has no sha256 and bytes"),
    ],
)
def test_a_lying_manifest_is_refused(copy: Path, change: dict[str, object], said: str) -> None:
    alter_sealed(copy / "manifest.json", lambda manifest: manifest.update(change))
    with pytest.raises(BundleError, match=said):
        Bundle.open(copy)
    (copy / "manifest.json").write_text(seal_text("{"))
    with pytest.raises(BundleError, match="is not JSON"):
        Bundle.open(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(BundleError, match="not a bundle: "):
        Bundle.open(copy)
    (copy / "l4").mkdir()
    (copy / "l4" / "manifest.json").touch()
    with pytest.raises(BundleError, match="give one of its bundles: l4"):
        Bundle.open(copy)


def reseal(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    seal(directory, {key: value for key, value in manifest.items() if key not in ("seal", "format", "coatrt", "files")})


def test_a_lora_of_another_configuration_is_found(copy: Path, tiny_adapter: Path) -> None:
    from coatrt.engines.runtime.lora_file import save_lora

    adapter = Adapter.from_pretrained(tiny_adapter)
    other = adapter.description.space.uniform("nf3-g32")
    save_lora(copy / "lora.safetensors", {k: v.numpy() for k, v in adapter.emit(other).items()}, other)
    reseal(copy)
    with pytest.raises(BundleError, match="differs from the hypernetwork's output"):
        verify(Bundle.open(copy))


def test_weights_that_are_not_the_configuration_are_found(copy: Path) -> None:
    graph = onnx.load(copy / "cpu.onnx", load_external_data=False).graph
    codes = [one for one in graph.initializer if "layers.0.mlp.down_proj" in one.name and ".codes" in one.name]
    where = {entry.key: int(entry.value) for entry in codes[0].external_data if entry.key != "location"}
    weights = bytearray((copy / "weights.bin").read_bytes())
    weights[where["offset"] : where["offset"] + where["length"]] = bytes(where["length"])
    (copy / "weights.bin").write_bytes(weights)
    reseal(copy)
    with pytest.raises(BundleError, match=r"has a quantization error of .* of its norm, the adapter measured"):
        verify(Bundle.open(copy))


def test_verify_without_the_model_says_so_and_refuses_another(copy: Path, tmp_path: Path) -> None:
    alter_sealed(copy / "manifest.json", lambda m: m["model"].update(source=str(tmp_path / "gone")))
    assert "gone; give it with --model" in verify(Bundle.open(copy)).note
    with pytest.raises(CheckpointError, match="fingerprint"):
        verify(Bundle.open(copy), model=save_tiny_llama(tmp_path / "other", seed=3))


def test_adapt_in_other_formats(tiny_bundle: Path, tmp_path: Path, tiny_llama: Path) -> None:
    import torch

    from coatrt.adapter.peft_format import write_emitted_peft
    from coatrt.engines.bundles.adapt import write_onnx_adapter

    ort = pytest.importorskip("onnxruntime")
    bundle = Bundle.open(tiny_bundle)
    emitter, config = Emitter.of(bundle), bundle.config
    tensors = emitter.emit(config)
    write_onnx_adapter(tmp_path / "a.onnx_adapter", tensors, emitter.contract)
    read = ort.AdapterFormat.read_adapter(str(tmp_path / "a.onnx_adapter")).get_parameters()
    assert set(read) <= {value.name for value in ort.InferenceSession(bundle.path("cpu.onnx")).get_inputs()}
    assert len(read) == 2 * 4 * 2  # A and B of q|k|v, o, gate|up and down in two layers
    layer = "model.layers.1.mlp."
    gate, up = (tensors[f"lora_B.{layer}{name}_proj"] for name in ("gate", "up"))
    whole = np.block([[gate, np.zeros_like(up)], [np.zeros_like(gate), up]])
    assert np.array_equal(read[f"lora_B.{layer}gate_up_proj"].numpy(), whole)
    assert np.array_equal(read[f"lora_B.{layer}down_proj"].numpy(), tensors[f"lora_B.{layer}down_proj"])
    write_emitted_peft(tmp_path / "peft", tensors, emitter.contract, "base")
    stored = load_file(str(tmp_path / "peft" / "adapter_model.safetensors"))
    first = emitter.contract.tensors[0]
    key = f"base_model.model.{first.matrix}.lora"
    a, b = stored[f"{key}_A.weight"], stored[f"{key}_B.weight"]
    x = np.random.default_rng(0).normal(size=first.K).astype(np.float32)
    np.testing.assert_allclose(
        emitter.contract.scale(first) * b @ (a @ x), x @ tensors[first.A] @ tensors[first.B], atol=1e-5
    )
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from coatrt.evaluation.fake_quant import FakeQuantModel
    from coatrt.quantization.code_cache import CodeStore

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "peft").eval()
    from coatrt.models.checkpoint import Checkpoint

    opened = Checkpoint.open(tiny_llama)
    ours = FakeQuantModel(opened, CodeStore(opened))
    ours.set_lora(bundle.contract, {name: torch.from_numpy(value.copy()) for name, value in tensors.items()})
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids), model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_bench_measures_and_accounts(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    result = bench(
        bundle, RuntimeOptions(threads=1), prompts=(4, 8), tokens=3, repeat=2, device=device_profile("rtx-3060")
    )
    assert [(row["tokens"], row["lora"], row["samples"]) for row in result["prefill"]] == [
        (4, True, 2),
        (4, False, 2),
        (8, True, 2),
        (8, False, 2),
    ]
    assert [row["samples"] for row in result["decode"]] == [6, 6]
    assert result["lora_switch"]["samples"] == 2
    size, model = result["bytes_per_token"], bundle.model_matrices
    assert size["weights"] == bundle.config.nbytes(model) + model.other_bytes
    assert size["lora"] == 4 * lora_elements(model)
    assert size["kv_cache"] == 2 * 2 * 2 * 16 * 11 * 4
    assert size["total"] == size["weights"] + size["lora"] + size["kv_cache"]
    assert result["bandwidth_share"] == pytest.approx(result["bytes_per_s"] / 360e9)
    for row in (*result["prefill"], *result["decode"], result["emission"], result["lora_switch"]):
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
    low, high = result["lora_overhead_interval"]
    assert low <= high and result["repetitions"] == 2
    text = bench_text(result)
    assert "decode, LoRA off" in text and "not known from 2 repetitions" in text
    row = next(line for line in text.splitlines() if line.startswith("decode, LoRA off"))
    assert len(row.split()) == 5  # p50 and tokens/s: of six samples there is no p90
    assert percentiles([0.001, 0.002, 0.003])["p50_ms"] == pytest.approx(2)
    with pytest.raises(ConfigError, match="must be at least 1"):
        bench(bundle, repeat=0)


def test_an_overhead_is_measured_within_each_repetition() -> None:
    """A machine that is twice as slow in one repetition than in another changes no overhead."""
    decode = {True: [1.1, 1.1, 2.2, 2.2, 3.3, 3.3], False: [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]}
    assert overheads(decode, 2) == pytest.approx([0.1] * 3)


def test_bench_decodes_behind_the_longest_prompt(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    decode = OrtDecoder.decode

    def spied(decoder: OrtDecoder, tokens: Sequence[int]) -> NDArray[np.float32]:
        seen.append(int(decoder.lengths[0]))
        return decode(decoder, tokens)

    monkeypatch.setattr(OrtDecoder, "decode", spied)
    result = bench(Bundle.open(tiny_bundle), RuntimeOptions(threads=1), prompts=(8, 4), tokens=2, repeat=1)
    assert set(seen) == {8, 9}
    assert {row["context"] for row in result["decode"]} == {10}


def test_assembling_refuses_before_it_writes(
    tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Adapter.from_pretrained(tiny_adapter)
    small = BundleOptions(context=64, engine=False)
    with pytest.raises(FormatError, match="rtx-3060"):
        make_bundle(adapter, adapter.description.space.uniform("fp8"), "rtx-3060", tmp_path / "b", small)
    with pytest.raises(ConfigError, match="was not trained for"):
        make_bundle(adapter, adapter.description.space.uniform("int8-g64"), "cpu", tmp_path / "b", small)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    config = adapter.description.space.uniform("int8")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds other files"):
            make_bundle(adapter, config, "cpu", tmp_path / "mine", small, overwrite=overwrite)

    def fails(*_: object, **__: object) -> None:
        raise BuildError("no")

    monkeypatch.setattr("coatrt.engines.bundles.execute.build_engine", fails)
    monkeypatch.setattr("coatrt.engines.bundles.execute.installed_builder", lambda _: "1")
    with pytest.raises(BuildError):
        make_bundle(adapter, config, "rtx-3060", tmp_path / "b", BundleOptions(context=64))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    told: list[str] = []
    made = make_bundle(adapter, config, "h100", tmp_path / "h", BundleOptions(context=64), tell=told.append)
    assert made.manifest["engines"] == []
    assert "run python build_engine.py in the bundle on the device" in told[0]
    with pytest.raises(ConfigError, match="holds a bundle"):
        make_bundle(adapter, config, "cpu", tmp_path / "h", small)
    make_bundle(adapter, adapter.description.space.uniform("fp8"), "cpu", tmp_path / "h", small, overwrite=True)
    assert Bundle.open(tmp_path / "h").config == adapter.description.space.uniform("fp8")


def test_the_front_door_plans_and_builds_once(tiny_adapter: Path, tmp_path: Path) -> None:
    request = PlanRequest(bits=6, context=64, prefill=16)
    for state in ("built", "current"):
        rows = build(tiny_adapter, ["cpu", "h100"], tmp_path / "b", request=request)
        assert [(row.target.output.name, row.state) for row in rows] == [("cpu", state), ("h100", state)]
    config = rows[0].bundle.config
    (row,) = build(tiny_adapter, ["cpu"], tmp_path / "c", config=config)
    assert row.bundle.config == config
    assert row.target.plan is None


@pytest.mark.rtx
def test_a_bundle_with_an_engine(tiny_adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    adapter, profile = Adapter.from_pretrained(tiny_adapter), device_profile("rtx-5090")
    plan = planner.plan(adapter.description, profile, bits=4.8, context=64)
    options = BundleOptions(context=64, shapes=EngineShapes(prefill=32))
    bundle = make_bundle(adapter, plan.config, profile.id, tmp_path / "b", options, plan=plan)
    (engine,) = bundle.manifest["engines"]
    assert engine["sms"] == [120]
    assert engine["bytes"] == bundle.path("sm120.engine").stat().st_size > plan.memory_bytes["weights"]
    text = verify(Bundle.open(tmp_path / "b")).text()
    assert "(its version is installed here)" in text
    assert "engine, here   " in text
