"""GPTQ checkpoints: codes, zero points of both versions, and groups in any order, against an independent packing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from coatrt.errors import CheckpointError
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode
from support.quantized import Tensors, base_model, gptq, integers, value, write_quantized

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path / "cache"))


def written(base: Path, where: Path, parts: dict[str, Tensors], layout: Any, **changes: Any) -> Checkpoint:
    """Write and open a checkpoint; `parts` receives codes, scales and zero points by module."""

    def pack(module: str, weight: torch.Tensor) -> Tensors | None:
        if module == "lm_head":
            return None
        parts[module], tensors = layout(weight)
        return tensors

    return Checkpoint.open(write_quantized(base, where / "quantized", {**CONFIG, **changes}, pack))


@pytest.mark.parametrize(("version", "bits"), [(1, 4), (2, 4), (1, 8), (2, 3), (1, 2)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_and_zero_points(base: Path, tmp_path: Path, version: int, bits: int, symmetric: bool) -> None:
    def layout(weight: torch.Tensor) -> tuple[Tensors, Tensors]:
        made = integers(weight, bits, 64, symmetric, torch.float16)
        return made, gptq(made, bits, version=version, group=64)

    parts: dict[str, Tensors] = {}
    checkpoint_format = {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    checkpoint = written(base, tmp_path, parts, layout, bits=bits, group_size=64, sym=symmetric, **checkpoint_format)
    store = CodeStore(checkpoint)
    assert len(parts) == 14
    for name, made in parts.items():
        exact = value(made, 64)
        assert torch.equal(checkpoint.tensor(f"{name}.weight"), exact.half()), name
        levels = made["codes"] - made["zero"].repeat_interleave(64, 1)
        held = "int4-g64" if -8 <= levels.min() and levels.max() <= 7 else "int8-g64"
        if levels.abs().max() > 127:
            assert name not in checkpoint.codes.formats  # type: ignore[union-attr]
            continue
        assert checkpoint.formats[name] == held
        matrix = store.get(name, held)
        assert torch.equal(matrix.codes.long(), levels)
        assert torch.equal(matrix.scales, made["scale"])  # type: ignore[arg-type]
        assert torch.equal(decode(matrix), exact)
    assert checkpoint.formats["lm_head"] == "bf16"


def test_groups_in_the_order_of_activations_are_decoded(base: Path, tmp_path: Path) -> None:
    orders = {}

    def layout(weight: torch.Tensor) -> tuple[Tensors, Tensors]:
        K = weight.shape[1]
        permutation = torch.randperm(K, generator=torch.Generator().manual_seed(K))
        made = integers(weight[:, permutation], 4, 128, True, torch.float16)
        inverse = permutation.argsort()
        order = (torch.arange(K) // 128)[inverse]  # group of each column
        exact = value(made, 128)[:, inverse]
        orders[K] = order
        return {"value": exact}, gptq({**made, "codes": made["codes"][:, inverse]}, 4, version=1, order=order)

    parts: dict[str, Tensors] = {}
    checkpoint = written(base, tmp_path, parts, layout, desc_act=True)
    assert checkpoint.codes is not None
    for name, made in parts.items():
        assert torch.equal(checkpoint.tensor(f"{name}.weight"), made["value"].half()), name
        is_decoded = "mlp.down" in name  # of 256 inputs, two groups; one group has no order
        assert (name in checkpoint.codes.decoded) == is_decoded
    assert "2 more" not in checkpoint.codes.line
    assert "down_proj, model.layers.1.mlp.down_proj decoded to 16 bits (groups in the order of" in checkpoint.codes.line


def test_dynamic_overrides_bits_by_module(base: Path, tmp_path: Path) -> None:
    def pack(module: str, weight: torch.Tensor) -> Tensors | None:
        if module == "lm_head":
            return None
        bits = 8 if module.endswith("down_proj") else 4
        return gptq(integers(weight, bits, 128, True, torch.float16), bits, version=1)

    dynamic = {"+:.*down_proj": {"bits": 8}, "-:lm_head": {}}
    checkpoint = Checkpoint.open(write_quantized(base, tmp_path / "q", {**CONFIG, "dynamic": dynamic}, pack))
    assert checkpoint.formats["model.layers.1.mlp.down_proj"] == "int8-g128"
    assert checkpoint.formats["model.layers.1.mlp.up_proj"] == "int4-g128"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, r"asks for 5 bits in groups of 128 for model\..*; allowed: 2, 3, 4, 8 bits"),
        ({"group_size": 0}, "groups of 0"),
        ({"group_size": 64}, r"in groups of 64 with scales"),
        ({"checkpoint_format": "marlin"}, "allowed: gptq, gptq_v2"),
        ({"is_marlin_format": True}, "Marlin"),
        ({"rotation": "hadamard"}, "key 'rotation', which coatrt does not know"),
        ({"dynamic": {"-:.*up_proj": {}}}, "dynamic excludes model.layers.0.mlp.up_proj"),
        ({"dynamic": {"+:(a+)+": {}}}, "no repeated group"),
        ({"dynamic": {"+:(": {}}}, "not a regular expression"),
        ({"dynamic": {"+:.*": {"wings": 2}}}, "key 'wings'"),
        ({"method": "qqq"}, "method 'qqq'"),
    ],
)
def test_other_settings_are_refused_by_name(base: Path, tmp_path: Path, changes: Any, message: str) -> None:
    def layout(weight: torch.Tensor) -> tuple[Tensors, Tensors]:
        made = integers(weight, 4, 128, True, torch.float16)
        return made, gptq(made, 4, version=1)

    with pytest.raises(CheckpointError, match=message):
        written(base, tmp_path, {}, layout, **changes)
