"""AWQ checkpoints: the interleaved columns, the zero points and the scales, against an independent packing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from coatrt.errors import CheckpointError
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode
from support.quantized import Tensors, awq, base_model, integers, value, write_quantized

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model", dtype="float16")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("group", [128, 32])
def test_codes_with_zero_points_are_held_in_int8(base: Path, tmp_path: Path, group: int) -> None:
    parts: dict[str, Tensors] = {}

    def pack(module: str, weight: torch.Tensor) -> Tensors | None:
        if module == "lm_head":
            return None
        parts[module] = integers(weight, 4, group, False, torch.float16)
        return awq(parts[module])

    changes = {"group_size": group, "modules_to_not_convert": ["lm_head"]}
    checkpoint = Checkpoint.open(write_quantized(base, tmp_path / "q", {**CONFIG, **changes}, pack))
    store = CodeStore(checkpoint)
    assert len(parts) == 14
    for name, made in parts.items():
        exact = value(made, group)
        assert torch.equal(checkpoint.tensor(f"{name}.weight"), exact.half()), name
        assert checkpoint.formats[name] == f"int8-g{group}"
        matrix = store.get(name, checkpoint.formats[name])
        assert torch.equal(matrix.codes.long(), made["codes"] - made["zero"].repeat_interleave(group, 1))
        assert torch.equal(matrix.scales, made["scale"])  # type: ignore[arg-type]
        assert torch.equal(decode(matrix), exact)
    assert checkpoint.codes is not None
    assert checkpoint.codes.line == f"AWQ checkpoint: its codes are kept (14 int8-g{group})"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "gemv"}, "version 'gemv'; allowed: 4 bits"),
        ({"bits": 3}, "asks for 3 bits"),
        ({"group_size": 64}, "in groups of 64 with scales"),
        ({"modules_to_not_convert": ["up_proj"]}, "excludes model.layers.0.mlp.up_proj"),
        ({"act_bits": 8}, "key 'act_bits'"),
    ],
)
def test_other_settings_are_refused_by_name(base: Path, tmp_path: Path, changes: Any, message: str) -> None:
    def pack(module: str, weight: torch.Tensor) -> Tensors | None:
        return None if module == "lm_head" else awq(integers(weight, 4, 128, False, torch.float16))

    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(write_quantized(base, tmp_path / "q", {**CONFIG, **changes}, pack))
