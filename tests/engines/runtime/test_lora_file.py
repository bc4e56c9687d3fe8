"""LoRA files: what may be in one, and that weights of another configuration are noticed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from coatrt.bundle import Bundle
from coatrt.cli.main import cli
from coatrt.configs.config import ConfigPatterns
from coatrt.engines.bundles.adapt import adapt
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.engines.runtime.switch import SwitchingDecoder
from coatrt.errors import ConfigError
from coatrt.system.notices import warn_once


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    warn_once.cache_clear()
    return Bundle.open(tiny_bundle)


def own(bundle: Bundle) -> dict[str, torch.Tensor]:
    return load_file(bundle.path("lora.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrower_floats_are_widened(bundle: Bundle, tmp_path: Path, dtype: torch.dtype) -> None:
    expected = {name: value.to(dtype) for name, value in own(bundle).items()}
    save_file(expected, tmp_path / "l.safetensors")
    found = load_lora(tmp_path / "l.safetensors", bundle.contract)
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], value.float().numpy())
    assert found.configuration == ""


def _replaced(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], Any]:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        name = next(iter(tensors))
        tensors[name] = change(tensors[name]).contiguous()

    return apply


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_replaced(lambda x: x.double()), r"is F64; allowed: F32, F16, BF16"),
        (_replaced(lambda x: x.int()), r"is I32; allowed: F32, F16, BF16"),
        (_replaced(lambda x: x.to(torch.float8_e4m3fn)), r"is F8_E4M3; allowed: F32, F16, BF16"),
        (_replaced(lambda x: x / 0), r"has values that are not finite"),
        (_replaced(lambda x: (x / 0).bfloat16()), r"has values that are not finite"),
        (_replaced(lambda x: x.T), r"has shape .*, the contract says"),
        (_replaced(lambda x: x[:0]), r"has shape .*, the contract says"),
        (lambda tensors: tensors.popitem(), r"differ in lora_[^ ;]*"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), r"differ in more"),
    ],
)
def test_what_is_no_lora_of_the_contract_is_one_line(
    bundle: Bundle, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], said: str
) -> None:
    tensors = own(bundle)
    change(tensors)
    save_file(tensors, tmp_path / "l.safetensors")
    shown = CliRunner().invoke(
        cli, ["run", str(bundle.directory), "-p", "x", "--lora", str(tmp_path / "l.safetensors")]
    )
    assert isinstance(shown.exception, ConfigError)
    with pytest.raises(ConfigError, match=rf"LoRA \S+l\.safetensors: .*{said}.*; emit it again") as error:
        load_lora(tmp_path / "l.safetensors", bundle.contract)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}x"])
def test_a_damaged_file_is_one_line(bundle: Bundle, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "l.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match=r"is damaged \(.*\); emit it again"):
        load_lora(tmp_path / "l.safetensors", bundle.contract)


def test_a_lora_of_other_weights_is_said_once_or_refused(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ConfigPatterns.from_json({"default": "nf3-g32"}).resolve(bundle.model_matrices)
    adapt(bundle, tmp_path / "other.safetensors", config)
    other, mine = (
        load_lora(path, bundle.contract) for path in (tmp_path / "other.safetensors", bundle.path("lora.safetensors"))
    )
    assert (other.configuration, mine.configuration) == (config.hash, bundle.config.hash)
    decoder, strict = load_decoder(bundle, context=64), load_decoder(bundle, context=64, strict_lora=True)
    decoder.set_lora(mine)
    strict.set_lora(mine)
    strict.set_lora(dict(other))  # tensors of the caller's own say nothing of where they are from
    strict.set_lora(None)
    assert capsys.readouterr().err == ""
    for _ in "ab":
        decoder.set_lora(other)
    said = f"emitted for configuration {config.hash}, but the weights have {bundle.config.hash}"
    line = f"coatrt: the LoRA was {said}; emit a LoRA for {bundle.config.hash} (coatrt adapt)\n"
    assert capsys.readouterr().err == line
    load_lora(bundle.path("lora.safetensors"), bundle.contract, bundle.config.hash, strict=True)
    with pytest.raises(ConfigError, match=said):
        load_lora(tmp_path / "other.safetensors", bundle.contract, bundle.config.hash, strict=True)
    with pytest.raises(ConfigError, match=said):
        strict.set_lora(other)
    with pytest.raises(ConfigError, match=said):
        strict.set_lora(Emitter.of(bundle).emit(config))
    SwitchingDecoder({"a": bundle}).switch("a")
    assert capsys.readouterr().err == ""
    run = ["run", str(bundle.directory), "-p", "x", "--max-tokens", "1", "--context", "32", "--lora"]
    warn_once.cache_clear()
    shown = CliRunner().invoke(cli, [*run, str(tmp_path / "other.safetensors")])
    assert shown.exit_code == 0
    assert said in shown.output
    refused = CliRunner().invoke(cli, [*run, str(tmp_path / "other.safetensors"), "--strict-lora"])
    assert isinstance(refused.exception, ConfigError)
    save_file(own(bundle), tmp_path / "plain.safetensors")
    shown = CliRunner().invoke(cli, [*run, str(tmp_path / "plain.safetensors")])
    assert "the LoRA names no configuration, but the weights have" in shown.output


def test_every_form_names_its_configuration(bundle: Bundle, tmp_path: Path) -> None:
    import onnxruntime as ort

    adapt(bundle, tmp_path / "peft", format="peft")
    with safe_open(tmp_path / "peft" / "adapter_model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "configuration": bundle.config.hash}
    adapt(bundle, tmp_path / "l.onnx_adapter", format="onnx-adapter")
    version = ort.AdapterFormat.read_adapter(str(tmp_path / "l.onnx_adapter")).get_model_version()
    assert f"{version:07x}" == bundle.config.hash[:7]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_onnx_adapter_has_the_dtype_of_the_cpu_form(dtype: str, bundle: Bundle, tmp_path: Path) -> None:
    import onnxruntime as ort

    cpu = bundle.manifest["decoders"]["cpu"]
    decoders: Any = {"cpu": {**cpu, "io": replace(cpu["io"], activations=dtype)}}
    adapt(Bundle(bundle.directory, {**bundle.manifest, "decoders": decoders}), tmp_path / "l", format="onnx-adapter")
    parameters = ort.AdapterFormat.read_adapter(str(tmp_path / "l")).get_parameters()
    expected = bundle.contract.graph_inputs({name: value.numpy() for name, value in own(bundle).items()}, dtype)
    assert set(parameters) == set(expected)
    for name, value in parameters.items():
        found = value.numpy()
        assert found.dtype == dtype
        assert np.abs(found - expected[name]).max() < 1e-6


def test_a_header_that_names_something_twice_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    data = bundle.path("lora.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    for more in (b'"__metadata__":{"configuration":"a","configuration":"b"},', b'"__metadata__":{},'):
        header = b"{" + more + data[9 : 8 + length]
        (tmp_path / "l.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        with pytest.raises(ConfigError, match=r"LoRA .*l\.safetensors .*(twice in one object|duplicate field)"):
            load_lora(tmp_path / "l.safetensors", bundle.contract)
