"""The matrices of a fused group as one: when their codes can be concatenated, and that a graph then has one product."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from coatrt.configs.config import QuantConfig
from coatrt.engines.bundles.stored_weights import stored_weights
from coatrt.export.decoder import GraphForm, export_decoder
from coatrt.export.joining import fused_groups, join
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import QuantizedMatrix, decode, encode
from coatrt.quantization.input_moments import Calibration

COUNTS = (24, 8, 10)
TOKENS = torch.randint(0, 272, (4, 24), generator=torch.Generator().manual_seed(1))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts_of(text: str, quantizer: str = "refined") -> tuple[QuantizedMatrix, list[QuantizedMatrix]]:
    """Return a matrix and its three parts."""
    x = normal(200, 96, seed=1)
    whole = encode(normal(sum(COUNTS), 96) * 0.02, text, quantizer, x.T @ x / 200)  # type: ignore[arg-type]
    return whole, whole.split(COUNTS)


@pytest.mark.parametrize("text", ["nf2-g32", "nf3-g32", "nf4-g16", "nvfp4", "int4-g32", "fp8", "int8", "fp16"])
def test_what_was_encoded_as_one_joins_to_the_same(text: str) -> None:
    whole, parts = parts_of(text)
    joint = join(parts)
    assert joint is not None
    assert torch.equal(decode(joint), decode(whole))
    assert (joint.N, joint.K, joint.grid, joint.constant) == (42, 96, whole.grid, whole.constant)
    assert (whole.levels is not None) == text.startswith(("nf2", "nf3"))
    assert join(parts[:1]) is None


def test_unequal_levels_do_not_join() -> None:
    _, parts = parts_of("nf2-g32")
    assert parts[1].levels is not None
    moved = parts[1].levels + torch.tensor([0, 0, 0, 2**-10])
    for levels in (moved.half(), None):
        other = replace(parts[1], levels=levels)
        assert join([parts[0], other, parts[2]]) is None
        assert join([other, parts[0], parts[2]]) is None
    plain = [replace(part, levels=None) for part in parts]
    joint = join(plain)
    assert joint is not None and joint.levels is None


def test_unequal_constants_formats_and_double_quantization_do_not_join() -> None:
    _, parts = parts_of("nvfp4")
    assert join([*parts[:2], replace(parts[2], constant=parts[2].constant / 2)]) is None
    assert join([parts[0], parts_of("int4-g32")[1][1]]) is None
    double = encode(normal(8, 96), "nf3-g32-dq4-bf16-64")
    assert join([double, double]) is None


def test_groups_come_one_after_another() -> None:
    _, (q, k, v) = parts_of("int8")
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    named = [
        ("model.embed_tokens", v),
        *((f"{attention}.{part}_proj", matrix) for part, matrix in zip("qkvo", (q, k, v, q), strict=True)),
        *((f"{mlp}.{part}_proj", q) for part in ("gate", "up", "down")),
    ]
    assert [list(group) for group in fused_groups(named)] == [
        ["model.embed_tokens"],
        [f"{attention}.{part}_proj" for part in "qkv"],
        [f"{attention}.o_proj"],
        [f"{mlp}.gate_proj", f"{mlp}.up_proj"],
        [f"{mlp}.down_proj"],
    ]


@pytest.mark.parametrize("text", ["nf3-g32", "nvfp4", "nf2-g32-dq4-bf16-64"])
def test_a_graph_has_one_product_for_a_group_that_was_encoded_as_one(
    tiny_llama: Path, tmp_path: Path, text: str
) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    config = QuantConfig.uniform(checkpoint.matrices, text)
    codes = CodeStore(checkpoint, "refined", Calibration(TOKENS))
    export_decoder(checkpoint, config, tmp_path, forms=[GraphForm("cpu", "cpu.onnx", "float32")], codes=codes)
    graph = onnx.load(tmp_path / "cpu.onnx", load_external_data=False).graph
    products = [node.name for node in graph.node if node.op_type == "MatMul" and "layers.0" in node.name]
    single = [f"{place}_proj.product" for place in ("q", "k", "v", "gate", "up")]
    joint = [f"{place}_proj.product" for place in ("qkv", "gate_up")]
    wanted = single if "dq" in text else joint
    assert sorted(name.rpartition(".layers.0.")[2].partition(".")[2] for name in products) == sorted(
        [*wanted, "o_proj.product", "down_proj.product"]
    )
    for name, weight in stored_weights(tmp_path / "cpu.onnx", checkpoint.matrices):
        np.testing.assert_array_equal(weight, decode(codes.get(name, text)).numpy(), err_msg=name)
