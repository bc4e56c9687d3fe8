"""Whom a bundle is believed: its seal, a signature, and graphs that read nothing but what the manifest names."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from coatrt.adapter.adapter import Adapter
from coatrt.bundle import MANIFEST, SIGNATURE, Bundle, seal
from coatrt.cli.main import cli
from coatrt.devices.profiles import device_profile
from coatrt.engines.bundles.adapt import adapt
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.targets import Target
from coatrt.engines.bundles.verify import verify
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.load import check_decoder, load_decoder
from coatrt.errors import BundleError, ConfigError
from coatrt.system.notices import warn_once
from support.bundles import build_targets
from support.keys import write_keys
from support.seals import alter_sealed


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def keys_in(directory: Path) -> tuple[Path, Path]:
    pytest.importorskip("cryptography", reason="needs the sign extra")
    made = write_keys(directory)
    assert made is not None
    return made


def reseal(directory: Path) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    seal(directory, {key: value for key, value in manifest.items() if key not in ("seal", "format", "coatrt", "files")})


def test_a_signature_is_required_warned_of_or_not_looked_at(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keys_in(tmp_path / "keys")
    with pytest.raises(
        BundleError, match=r"has no signature by .*pub\.pem \(no model\.sig\); download the bundle again"
    ):
        Bundle.open(copy, key=public)
    Bundle.open(copy).sign(private)
    opened = Bundle.open(copy, key=public)
    assert opened.signed is True
    assert opened.check_all() == len(opened.manifest["files"])
    assert "signature      made by the key given" in verify(opened, numbers=False).text()
    assert Bundle.open(copy).signed is None
    alter_sealed(copy / "manifest.json", lambda manifest: manifest.update(quantizer="absmax"))  # by an enemy
    Bundle.open(copy)
    with pytest.raises(BundleError, match="signature of another file"):
        Bundle.open(copy, key=public)
    warn_once.cache_clear()
    for _ in "ab":
        assert Bundle.open(copy, key=public, policy="warn").signed is False
    assert capsys.readouterr().err.count("has no signature by") == 1
    assert Bundle.open(copy, key=public, policy="off").signed is None
    with pytest.raises(ConfigError, match=r"signature policy require needs a public key; give one \(--key"):
        Bundle.open(copy, policy="require")
    with pytest.raises(ConfigError, match="signature must be one of off, warn, require, got 'on'"):
        Bundle.open(copy, policy="on")  # type: ignore[arg-type]
    (copy / "lora_io.json").write_text("{}")
    with pytest.raises(BundleError, match="bytes, the manifest says"):
        Bundle.open(copy).sign(private)


def test_a_build_signs_and_leaves_no_unsigned_bundle_as_it_is(tiny_adapter: Path, tmp_path: Path) -> None:
    private, public = keys_in(tmp_path / "keys")
    adapter = Adapter.from_pretrained(tiny_adapter)
    target = Target(device_profile("cpu"), adapter.description.space.uniform("int8"), tmp_path / "b")
    more: dict[str, Any] = {"options": BundleOptions(context=64, engine=False)}
    build_targets(adapter, adapter.checkpoint(), [target], **more)
    with pytest.raises(ConfigError, match="holds a bundle; give a new directory, or --overwrite"):
        build_targets(adapter, adapter.checkpoint(), [target], **more, sign=private)
    (row,) = build_targets(adapter, adapter.checkpoint(), [target], **more, sign=private, overwrite=True)
    assert row.state == "built"
    assert Bundle.open(tmp_path / "b", key=public).signed
    (row,) = build_targets(adapter, adapter.checkpoint(), [target], **more, sign=private)
    assert row.state == "current"
    (tmp_path / "b" / SIGNATURE).unlink()
    with pytest.raises(ConfigError, match="holds a bundle"):
        build_targets(adapter, adapter.checkpoint(), [target], **more, sign=private)


def test_the_commands_ask_for_a_signature(tiny_adapter: Path, tmp_path: Path) -> None:
    private, public = keys_in(tmp_path / "keys")
    (tmp_path / "c.json").write_text('{"default": "int8"}')
    output = str(tmp_path / "b")
    export = ["export", str(tiny_adapter), "--config", str(tmp_path / "c.json"), "-o", output, "--context", "64"]
    assert CliRunner().invoke(cli, [*export, "--sign", str(private)]).exit_code == 0
    page = tmp_path / "r.html"
    commands = {  # what it does where the bundle is signed, and where it is not and that is only said
        ("run", output, "-p", "hi", "--max-tokens", "1", "--context", "32"): ("", ""),
        ("verify", output, "--no-torch"): ("signature      made by the key given", "not made by the key given"),
        ("bench", output, "--prompt", "4", "--tokens", "1", "--repeat", "1"): ("decode", "decode"),
        ("adapt", output, "-o", str(tmp_path / "l.safetensors")): ("LoRA of", "LoRA of"),
        ("report", output, "-o", str(page)): ("1 configuration, ", "1 configuration, "),
    }
    for command, (said, _) in commands.items():
        shown = CliRunner().invoke(cli, [*command, "--key", str(public)])
        assert shown.exit_code == 0 and said in shown.output, (command, shown.output, shown.exception)
    assert "<code>made by the key given</code>" in page.read_text()
    assert "made by the key given" not in CliRunner().invoke(cli, ["verify", output, "--no-torch"]).output
    (tmp_path / "b" / SIGNATURE).unlink()
    for command, (_, said) in commands.items():
        for more in ((), ("--signature", "require")):
            refused = CliRunner().invoke(cli, [*command, "--key", str(public), *more])
            assert isinstance(refused.exception, BundleError), command
            assert "has no signature by" in str(refused.exception)
        warn_once.cache_clear()
        warned = CliRunner().invoke(cli, [*command, "--key", str(public), "--signature", "warn"])
        assert warned.exit_code == 0 and said in warned.output, (command, warned.exception)
        assert "has no signature by" in warned.output
        off = CliRunner().invoke(cli, [*command, "--key", str(public), "--signature", "off"])
        assert off.exit_code == 0 and "signature by" not in off.output
        assert isinstance(CliRunner().invoke(cli, [*command, "--signature", "require"]).exception, ConfigError)
    plan = ["report", str(tiny_adapter), "--target", "t4", "-o", str(page), "--key", str(public)]
    said = str(CliRunner().invoke(cli, plan).exception)
    assert said == "a key or signature policy is given and no bundle; adapters are not signed: give bundles too"


def _externals(message: Any) -> list[Any]:
    return [tensor for tensor in message.graph.initializer if tensor.external_data]


def _move(model: Any) -> None:
    for entry in _externals(model)[0].external_data:
        if entry.key == "location":
            entry.value = "unnamed.bin"


def _hide(model: Any) -> None:
    """Put a tensor of another file into a subgraph of a function that nothing calls."""
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../outside.bin")
    body = onnx.helper.make_graph([], "body", [], [], [tensor])
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    opset = onnx.helper.make_opsetid("", 24)
    model.functions.append(onnx.helper.make_function("d", "f", ["c"], ["y"], [node], [opset]))


@pytest.mark.parametrize(
    ("name", "change", "location"),
    [
        ("cpu.onnx", _move, "unnamed.bin"),
        ("cpu.onnx", _hide, "../outside.bin"),
        ("hypernet.onnx", _hide, "../outside.bin"),
    ],
)
def test_a_graph_that_reads_an_unnamed_file_is_refused_before_anything_is_loaded(
    copy: Path, tmp_path: Path, name: str, change: Callable[[Any], None], location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(copy / name, load_external_data=False)
    change(model)
    (copy / name).write_bytes(model.SerializeToString())
    reseal(copy)
    shutil.copyfile(copy / "weights.bin", copy / "unnamed.bin")
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: pytest.fail("something was loaded"))
    said = rf"{name} reads weights from '{location}', the manifest allows \S+; do not use this bundle"
    uses: list[Callable[[Bundle], object]] = [lambda bundle: adapt(bundle, tmp_path / "l.safetensors")]
    if name == "cpu.onnx":
        uses += [load_decoder, lambda bundle: check_decoder(bundle, "ort")]
        shown = CliRunner().invoke(cli, ["run", str(copy), "-p", "hi"])
        assert isinstance(shown.exception, BundleError)
        (copy / "unnamed.bin").unlink()
        uses.append(verify)
    else:
        uses.append(Emitter.of)
    for use in uses:
        with pytest.raises(BundleError, match=said):
            use(Bundle.open(copy))


def test_a_graph_of_another_kind_is_refused(copy: Path) -> None:
    (copy / "cpu.onnx").rename(copy / "cpu.ort")
    alter_sealed(copy / "manifest.json", lambda m: m["decoders"]["cpu"].update(file="cpu.ort"))
    alter_sealed(copy / "manifest.json", lambda m: m["files"].update({"cpu.ort": m["files"].pop("cpu.onnx")}))
    with pytest.raises(BundleError, match=r"not an ONNX graph: .*cpu\.ort \(its name does not end in \.onnx\)"):
        load_decoder(Bundle.open(copy))


def test_a_manifest_without_errors_is_not_verified(copy: Path) -> None:
    errors = Bundle.open(copy).manifest["configuration"]["errors"]
    alter_sealed(copy / "manifest.json", lambda m: m["configuration"].update(errors={}))
    with pytest.raises(
        BundleError, match=r"lacks the quantization error of model\S+ and \d+ more matrices, which verify compares"
    ):
        verify(Bundle.open(copy), numbers=False)
    alter_sealed(copy / "manifest.json", lambda m: m["configuration"].update(errors=errors))
    alter_sealed(copy / "manifest.json", lambda m: m["configuration"]["errors"].pop("model.embed_tokens"))
    with pytest.raises(BundleError, match=r"lacks the quantization error of model.embed_tokens, which"):
        verify(Bundle.open(copy), numbers=False)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["configuration"]["errors"]
    (copy / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    with pytest.raises(BundleError, match="was altered or is damaged; build the bundle again"):
        Bundle.open(copy)


@pytest.mark.parametrize("source", ["someone/a-model", None])
def test_verify_asks_no_server(copy: Path, monkeypatch: pytest.MonkeyPatch, source: str | None) -> None:
    def connect(*_: object, **__: object) -> None:
        pytest.fail("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if source is not None:
        alter_sealed(copy / "manifest.json", lambda m: m["model"].update(source=source))
    report = verify(Bundle.open(copy))
    assert (report.note == "no model at someone/a-model; give it with --model") == (source is not None)
    assert (report.torch_difference is None) == (source is not None)


def test_an_engine_is_not_said_to_load(copy: Path) -> None:
    from coatrt.devices.environment import versions

    package, version = next(iter(versions().items()))
    (copy / "sm86.engine").write_bytes(b"engine")
    facts = Bundle.open(copy).manifest
    for told, said in ((version, "its version is installed here"), ("0", f"needs 0, installed is {version}")):
        engine = {"file": "sm86.engine", "sms": [86], "builder": package, "version": told, "seconds": 1.0, "bytes": 6}
        kept = {key: value for key, value in facts.items() if key not in ("format", "coatrt", "files")}
        seal(copy, {**kept, "engines": [{**engine, "shapes": {}}]})
        text = verify(Bundle.open(copy), numbers=False).text()
        assert f"({said})" in text
        assert "engine, here   not run: " in text
