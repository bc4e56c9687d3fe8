"""ModelOpt checkpoints: NVFP4 and FP8, by config.json and by hf_quant_config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from coatrt.errors import CheckpointError
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode
from support.quantized import Tensors, base_model, nvfp4, write_quantized


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model", initializer_range=0.2)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path / "cache"))


def fp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.abs().max() / 448).float()
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, codes.float() * scale


def own(algorithm: str, **changes: Any) -> dict[str, Any]:
    """Return hf_quant_config.json."""
    settings = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"], **changes}
    return {"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": settings}


def test_nvfp4(base: Path, tmp_path: Path) -> None:
    values: dict[str, torch.Tensor] = {}

    def pack(module: str, weight: torch.Tensor) -> Tensors | None:
        if module == "lm_head":
            return None
        tensors, values[module] = nvfp4(weight)
        scales = {"k_scale": torch.tensor(1.0)} if module.endswith("k_proj") else {}
        return {**tensors, "input_scale": torch.tensor(0.01), **scales}

    directory = write_quantized(base, tmp_path / "q", {}, pack)
    (directory / "hf_quant_config.json").write_text(json.dumps(own("NVFP4", group_size=16)))
    checkpoint = Checkpoint.open(directory)
    store = CodeStore(checkpoint)
    assert checkpoint.codes is not None
    held = [name for name in values if name in checkpoint.codes.formats]
    assert len(values) == 14
    assert len(held) > 7
    for name, exact in values.items():
        assert torch.equal(checkpoint.tensor(f"{name}.weight"), exact.bfloat16()), name
    for name in held:
        assert checkpoint.formats[name] == "nvfp4"
        assert torch.equal(decode(store.get(name, "nvfp4")), values[name]), name
        half = decode(store.get(name, "nvfp4"), torch.float16).float()
        assert float((half - values[name]).norm() / values[name].norm()) < 1e-3
    assert checkpoint.codes.line.endswith("its activations are not quantized here; its KV cache is not quantized here")
    for name, why in checkpoint.codes.decoded.items():
        assert "float16 does not hold" in why, name


def test_fp8_by_config_json(base: Path, tmp_path: Path) -> None:
    values: dict[str, torch.Tensor] = {}

    def pack(module: str, weight: torch.Tensor) -> Tensors | None:
        if module == "lm_head":
            return None
        tensors, values[module] = fp8(weight)
        return tensors

    arguments = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"weights": arguments, "input_activations": arguments, "targets": ["Linear"]}
    config = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], "config_groups": {"g": group}}
    checkpoint = Checkpoint.open(write_quantized(base, tmp_path / "q", config, pack))
    store = CodeStore(checkpoint)
    assert checkpoint.codes is not None
    assert "rounded to float16" in checkpoint.codes.line
    for name, exact in values.items():
        assert torch.equal(checkpoint.tensor(f"{name}.weight"), exact.bfloat16()), name
        matrix = store.get(name, "fp8")
        scale = exact.abs().max() / 448  # the largest value has the code 448
        assert torch.equal(matrix.codes.float() * scale, exact)
        assert torch.allclose(decode(matrix), exact, rtol=2**-11, atol=0)


def test_mixed_precision_by_layer(base: Path, tmp_path: Path) -> None:
    def pack(module: str, weight: torch.Tensor) -> Tensors | None:
        if module == "lm_head" or "o_proj" in module:
            return None
        return fp8(weight)[0] if "attn" in module else nvfp4(weight)[0]

    parts = ("q_proj", "k_proj", "v_proj")
    layers = {f"model.layers.{i}.self_attn.{part}": {"quant_algo": "FP8"} for i in range(2) for part in parts}
    mlp = ("gate_proj", "up_proj", "down_proj")
    layers |= {
        f"model.layers.{i}.mlp.{part}": {"quant_algo": "NVFP4", "group_size": 16} for i in range(2) for part in mlp
    }
    directory = write_quantized(base, tmp_path / "q", {}, pack)
    settings = own("MIXED_PRECISION", quantized_layers=layers, exclude_modules=None)
    (directory / "hf_quant_config.json").write_text(json.dumps(settings))
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.formats["model.layers.0.self_attn.q_proj"] == "fp8"
    assert checkpoint.formats["model.layers.0.self_attn.o_proj"] == "bf16"
    assert checkpoint.formats["model.layers.0.mlp.up_proj"] in ("nvfp4", "bf16")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (own("W4A16_AWQ"), "algorithm 'W4A16_AWQ' for model"),
        (own("NVFP4", exclude_modules=["lm_head", "*.up_proj"]), "up_proj is excluded, the files hold it quantized"),
        (own("NVFP4", exclude_modules=[]), "lm_head is NVFP4, the files hold it plain"),
        (own("NVFP4", smoothing=1), "key 'smoothing'"),
        (own("FP8"), r"as U8, not F8_E4M3"),
        ({"producer": {"name": "quark"}, "quantization": {}}, "is of 'quark', not modelopt"),
    ],
)
def test_other_settings_are_refused_by_name(base: Path, tmp_path: Path, settings: Any, message: str) -> None:
    def pack(module: str, weight: torch.Tensor) -> Tensors | None:
        return None if module == "lm_head" else nvfp4(weight)[0]

    directory = write_quantized(base, tmp_path / "q", {}, pack)
    (directory / "hf_quant_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(directory)
