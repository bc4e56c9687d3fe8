"""The C++ library: built with sanitizers, then asked the same questions as Python about the same bundles."""

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from coatrt.adapter.adapter import Adapter
from coatrt.bundle import Bundle, seal
from coatrt.cli.main import cli
from coatrt.configs.config import ConfigPatterns
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.generate import generate
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora, save_lora
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.errors import CoatError
from coatrt.system.notices import warn_once
from support.bundles import make_bundle
from support.seals import alter_sealed, seal_text

PROMPT = [10, 200, 30, 44, 5, 66, 77]


@pytest.fixture(scope="session")
def bundles(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """int8, int4, and nf3 with int8 and fp16 activations."""
    adapter = Adapter.from_pretrained(tiny_adapter)
    made = {}
    mixed = ConfigPatterns.from_json({"patterns": {"*v_proj": "int8", "*embed_tokens": "int8"}, "default": "nf3-g32"})
    for name, config in {
        "int8": adapter.description.space.uniform("int8"),
        "int4": adapter.description.space.uniform("int4-g32"),
        "nf3": mixed.resolve(adapter.description.space.model),
    }.items():
        made[name] = tmp_path_factory.mktemp("cpp") / name
        options = BundleOptions(context=96, engine=False)
        make_bundle(adapter, config, "rtx-4090", made[name], options)
    return made


def engine_bundle(source: Path, target: Path) -> Path:
    """A copy whose engine is one that the stub of TensorRT takes."""
    shutil.copytree(source, target)
    (target / "sm89.engine").write_bytes(b"engine")
    engine = {
        "file": "sm89.engine",
        "sms": [86, 89],
        "builder": "tensorrt-rtx",
        "version": "9.9.0.1",
        "shapes": {"batch": 1, "prefill": 4, "logits": 1},
    }
    facts = {k: v for k, v in Bundle.open(source).manifest.items() if k not in ("format", "coatrt", "files")}
    seal(target, facts | {"engines": [engine]})
    return target


def test_units_sessions_threads_and_the_tensorrt_stub(cpp: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    environment = {
        "COATRT_TEST_BUNDLE": str(tiny_bundle),
        "COATRT_TEST_ENGINE_BUNDLE": str(engine_bundle(tiny_bundle, tmp_path / "engine")),
    }
    command = ["ctest", "--test-dir", str(cpp.directory), "--output-on-failure"]
    done = subprocess.run(command, env=cpp.environment | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("kind", ["int8", "int4", "nf3"])
def test_tokens_and_logits_equal_pythons(cpp: Any, bundles: dict[str, Path], kind: str) -> None:
    bundle = Bundle.open(bundles[kind])
    decoder = load_decoder(bundle, RuntimeOptions(context=64, threads=1))
    for lora in (True, False):
        decoder.set_lora(load_lora(bundle.path("lora.safetensors"), bundle.contract) if lora else None)
        request = {"prompt": PROMPT, "tokens": 40, "steps": 6, "context": 64, "lora": lora}
        found = cpp.probe("run", bundles[kind], json.dumps(request))
        expected = generate(decoder, [PROMPT], max_tokens=40, stop=bundle.manifest["model"]["stop_tokens"])[0]
        assert (tuple(found["tokens"]), found["reason"]) == (expected.tokens, expected.reason)
        assert len(expected.tokens) > 5 or expected.reason == "stop"
        logits = decoder.prefill([PROMPT])[0]
        for row in found["logits"]:
            np.testing.assert_allclose(np.array(row, np.float32), logits, atol=1e-4)
            token = int(logits.argmax())
            decoder.decode([token])
            logits = decoder.decode([token])[0]
    assert found["capacity"] == decoder.capacity


def test_lora_equals_pythons_bit_for_bit(cpp: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, rng = Bundle.open(tiny_bundle), random.Random(0)
    emitter = Emitter.of(bundle)
    configurations: list[dict[str, Any]] = [{"default": name} for name in emitter.formats]
    configurations += [
        {"matrices": {name: rng.choice(emitter.formats) for name in bundle.model_matrices.names}} for _ in range(4)
    ]
    configurations.append({"patterns": {"*.[qkv]_proj": "int8", "*_proj": "nf3-g32"}, "default": "fp8"})
    for value in configurations:
        (tmp_path / "c.json").write_text(json.dumps(value))
        config = ConfigPatterns.from_json(value).resolve(bundle.model_matrices)
        answer = cpp.probe("adapt", tiny_bundle, tmp_path / "c.json", tmp_path / "lora.safetensors")
        assert answer == {"hash": config.hash, "formats": {n: str(f) for n, f in config.formats.items()}}
        found, expected = load_file(tmp_path / "lora.safetensors"), emitter.emit(config)
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert found[name].tobytes() == tensor.tobytes(), name
    found = cpp.probe("lora", tiny_bundle, tmp_path / "lora.safetensors")
    assert found == {"tensors": len(expected), "configuration": config.hash}


@pytest.mark.parametrize(
    "value",
    [
        {"matrices": {"model.layers.9.mlp.up_proj": "int8"}, "default": "int8"},
        {"patterns": {"nothing": "int8"}, "default": "int8"},
        {"default": "int5"},
        {"default": "int4"},
        {"formats": {}},
        {},
        {"patterns": {"*_proj": "int8"}},
        {"patterns": {".*_proj": "int8"}, "default": "int8"},
        {"patterns": {"(.*)*(.*)*(.*)*(.*)*x": "int8"}, "default": "int8"},
        {"patterns": {"model\\.norm": "int8"}, "default": "int8"},
        {"patterns": {"[": "int8"}, "default": "int8"},
        {"default": "int8-g64"},
        {"patterns": {"*": "nf3-g32-dq9-bf16-16"}},
        [1],
        {"matrices": []},
    ],
)
def test_configurations_are_refused_in_pythons_words(cpp: Any, tiny_bundle: Path, tmp_path: Path, value: Any) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(value))
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(CoatError) as error:
        Emitter.of(bundle).emit(ConfigPatterns.from_json(value, str(path)).resolve(bundle.model_matrices))
    expected = str(error.value).replace("list", "array")
    assert cpp.refusal("adapt", tiny_bundle, path, tmp_path / "o") == expected


def _alter(directory: Path, change: Any) -> None:
    alter_sealed(directory / "manifest.json", change)


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Any] = {
    "flipped byte": lambda d: _flip(d / "cpu.onnx", 1000),
    "flipped byte in the LoRA": lambda d: _flip(d / "lora.safetensors", 20),
    "truncated": lambda d: (d / "weights.bin").write_bytes((d / "weights.bin").read_bytes()[:-1]),
    "missing": lambda d: (d / "hypernet.onnx").unlink(),
    "a directory instead": lambda d: ((d / "hypernet.onnx").unlink(), (d / "hypernet.onnx").mkdir()),
    "no manifest": lambda d: (d / "manifest.json").unlink(),
    "flipped byte in the manifest": lambda d: _flip(d / "manifest.json", 1000),
    "no seal": lambda d: _flip(d / "manifest.json", 4),
    "another format": lambda d: _alter(d, lambda m: m.update(format=2)),
    "format as text": lambda d: _alter(d, lambda m: m.update(format="1")),
    "no files": lambda d: _alter(d, lambda m: m.pop("files")),
    "files as a list": lambda d: _alter(d, lambda m: m.update(files=[])),
    "path out of the bundle": lambda d: _alter(d, lambda m: m["files"].update({"../x": m["files"]["cpu.onnx"]})),
    "absolute path": lambda d: _alter(d, lambda m: m["files"].update({"/etc/passwd": m["files"]["cpu.onnx"]})),
    "backslash": lambda d: _alter(d, lambda m: m["files"].update({"..\\x": m["files"]["cpu.onnx"]})),
    "no hash": lambda d: _alter(d, lambda m: m["files"]["cpu.onnx"].pop("sha256")),
    "a file too many": lambda d: (d / "tokenizer" / "more.bin").write_bytes(b"x"),
    "a link": lambda d: (d / "more.bin").symlink_to("plan.json"),
    "a linked folder": lambda d: (d / "tokenizer" / "more").symlink_to(d.parent),
    "a link out of the bundle": lambda d: (
        (d / "plan.json").rename(d.parent / "plan.json"),
        (d / "plan.json").symlink_to("../plan.json"),
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_bundle_is_refused_in_pythons_words(cpp: Any, tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    DAMAGE[name](directory)
    with pytest.raises(CoatError) as error:
        Bundle.open(directory).check_all()
    assert cpp.refusal("check", directory) == str(error.value).replace("format 1,", 'format "1",')


OWN_WORDS: dict[str, tuple[Any, str]] = {
    "not JSON": (lambda d: (d / "manifest.json").write_text(seal_text('{"format": 1,')), "is not JSON"),
    "nested": (lambda d: (d / "manifest.json").write_text(seal_text('"a":' + "[" * 100_000)), "nested deeper than 64"),
    "negative bytes": (lambda d: _alter(d, lambda m: m["files"]["cpu.onnx"].update(bytes=-1)), "has no sha256"),
    "huge bytes": (lambda d: _alter(d, lambda m: m["files"]["cpu.onnx"].update(bytes=2**64)), "has no sha256"),
    "NUL in a name": (lambda d: _alter(d, lambda m: m["files"].update({"a\0b": m["files"]["cpu.onnx"]})), "leaves"),
    "matrices": (lambda d: _alter(d, lambda m: m.update(matrices={"matrices": [[1]]})), "is garbled (matrices)"),
    "stop tokens": (lambda d: _alter(d, lambda m: m["model"].update(stop_tokens="2")), "is garbled (stop_tokens)"),
}


@pytest.mark.parametrize("name", OWN_WORDS)
def test_a_lying_manifest_is_refused(cpp: Any, tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    OWN_WORDS[name][0](directory)
    assert OWN_WORDS[name][1] in cpp.refusal("check", directory)


LIES: dict[str, tuple[Any, str]] = {
    "heads": (lambda m: m["decoders"]["cpu"]["io"].update(kv_heads=3), "ONNX Runtime fails"),
    "vocabulary": (lambda m: m["decoders"]["cpu"]["io"].update(vocabulary=10_000), "ONNX Runtime fails"),
    "layers": (lambda m: m["decoders"]["cpu"]["io"].update(layers=1), "ONNX Runtime fails"),
    "more layers": (lambda m: m["decoders"]["cpu"]["io"].update(layers=3), "ONNX Runtime fails"),
    "half": (lambda m: m["decoders"]["cpu"]["io"].update(activations="float16"), "ONNX Runtime fails"),
    "huge": (lambda m: m["decoders"]["cpu"]["io"].update(head_dim=2**61), "inputs and outputs are garbled"),
    "zero": (
        lambda m: m["decoders"]["cpu"]["io"].update(head_dim=0),
        "decoder head_dim must be a whole number of at least 1, got 0",
    ),
    "no graph": (lambda m: m["decoders"].pop("cpu"), "has no cpu graph, only cuda, engine; build it again"),
    "weights elsewhere": (lambda m: m["decoders"]["cpu"].update(weights="../x"), "has no file ../x; it has"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_about_the_graph_are_refused(cpp: Any, tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    _alter(directory, LIES[name][0])
    assert LIES[name][1] in cpp.refusal("run", directory, json.dumps({"prompt": PROMPT, "steps": 2, "context": 64}))


def test_a_lora_of_another_model_is_refused(cpp: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_bundle / "lora.safetensors")
    name = next(iter(tensors))
    for change, message in (
        ({name: tensors[name].T.copy()}, f"{name} has shape"),
        ({name: tensors[name].astype(np.float16)}, f"{name} is F16, the contract says F32"),
        ({"more": tensors[name]}, "the LoRA and its contract differ in more; emit it again"),
    ):
        save_file({**tensors, **change}, str(tmp_path / "l.safetensors"))
        assert message in cpp.refusal("lora", tiny_bundle, tmp_path / "l.safetensors")
    assert "does not exist" in cpp.refusal("lora", tiny_bundle, tmp_path / "nothing")
    (tmp_path / "l.safetensors").write_bytes(b"\xff" * 64)
    assert "is damaged (its header claims" in cpp.refusal("lora", tiny_bundle, tmp_path / "l.safetensors")


def test_loras_name_their_configuration_in_both_languages(cpp: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    (tmp_path / "c.json").write_text('{"default": "nf3-g32"}')
    (tmp_path / "own.json").write_bytes(bundle.path(bundle.manifest["configuration"]["file"]).read_bytes())
    config = ConfigPatterns.from_json({"default": "nf3-g32"}).resolve(bundle.model_matrices)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("cpp", "python", "own", "plain")}
    assert cpp.probe("adapt", tiny_bundle, tmp_path / "c.json", files["cpp"])["hash"] == config.hash
    cpp.probe("adapt", tiny_bundle, tmp_path / "own.json", files["own"])
    save_lora(files["python"], Emitter.of(bundle).emit(config), config)
    save_file(load_file(files["cpp"]), files["plain"])  # says nothing of its configuration
    expected = {"cpp": config.hash, "python": config.hash, "own": bundle.config.hash, "plain": ""}
    for name, path in files.items():
        assert load_lora(path, bundle.contract).configuration == expected[name]
        assert cpp.probe("lora", tiny_bundle, path)["configuration"] == expected[name]
        assert (tmp_path / path.name).read_bytes()[8:].startswith(b'{"__metadata__"') == (name != "plain")

    said = f"the LoRA was emitted for configuration {config.hash}, but the weights have {bundle.config.hash}"
    nothing = f"the LoRA names no configuration, but the weights have {bundle.config.hash}"
    for name, line in {"cpp": said, "python": said, "own": "", "plain": nothing}.items():
        line = line and f"{line}; emit a LoRA for {bundle.config.hash} (coatrt adapt)"
        request = {"prompt": PROMPT, "tokens": 4, "context": 64, "lora_file": str(files[name])}
        done = cpp.run("probe", "run", tiny_bundle, json.dumps(request))
        assert (done.returncode, done.stderr) == (0, line and f"coatrt: {line}\n")
        warn_once.cache_clear()
        arguments = ["run", str(tiny_bundle), "-p", "x", "--max-tokens", "1", "--context", "32", "--lora"]
        shown = CliRunner().invoke(cli, [*arguments, str(files[name])])
        assert (shown.exit_code, shown.stderr.removesuffix("1 token\n")) == (0, line and f"coatrt: {line}\n")
        strict = json.dumps(request | {"strict_lora": True})
        if line:
            assert cpp.refusal("run", tiny_bundle, strict) == line
        else:
            cpp.probe("run", tiny_bundle, strict)
    named = {"prompt": PROMPT, "tokens": 4, "context": 64, "configuration": {"default": "nf3-g32"}}
    done = cpp.run("probe", "run", tiny_bundle, json.dumps(named))
    assert (done.returncode, done.stderr) == (0, "")  # whoever names the configuration knows
    assert said in cpp.refusal("run", tiny_bundle, json.dumps(named | {"strict_lora": True}))


@pytest.mark.parametrize("metadata", ["[]", "1", '{"configuration": 1}', '{"configuration": {"a": "b"}}'])
def test_a_lora_whose_metadata_lies_is_refused(cpp: Any, tiny_bundle: Path, tmp_path: Path, metadata: str) -> None:
    data = (tiny_bundle / "lora.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(header | {"__metadata__": json.loads(metadata)}).encode()
    (tmp_path / "l.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    said = cpp.refusal("lora", tiny_bundle, tmp_path / "l.safetensors")
    assert said.endswith("is damaged (its metadata is not an object of strings); emit it again with coatrt adapt")
    with pytest.raises(CoatError, match="is damaged"):
        load_lora(tmp_path / "l.safetensors", Bundle.open(tiny_bundle).contract)


def test_the_c_functions(cpp: Any, bundles: dict[str, Path]) -> None:
    done = cpp.run("c_api", bundles["int8"], *PROMPT)
    assert done.returncode == 0, done.stderr
    expected = cpp.probe("run", bundles["int8"], json.dumps({"prompt": PROMPT, "tokens": 8, "context": 64}))["tokens"]
    assert list(map(int, done.stdout.split())) == expected
