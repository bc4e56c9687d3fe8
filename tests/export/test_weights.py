"""Every weight format in both graph forms decodes to the bits of `coatrt.quantization.codec.decode`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from coatrt.export.graph import TORCH_DTYPES, GraphBuilder, GraphForm
from coatrt.export.weight_file import WeightFile
from coatrt.export.weights import STORAGES, write_matrix, write_table
from coatrt.export.weights.base import nibbles
from coatrt.export.weights.packing import pack_plane
from coatrt.quantization.codec import QuantizedMatrix, decode, encode
from coatrt.quantization.weight_format import KINDS
from support.formats import PAPER_FORMATS

PLAIN = (
    "fp16", "bf16", "int8", "int8-g32", "int8-g64", "int8-g128", "int4-g32", "int4-g64", "int4-g128", "fp8", "nvfp4",
    "nf2-g16", "nf3-g32", "nf4-g64", "nf8-g16", "nf4-g32",
)  # fmt: skip
DOUBLE = (
    "nf2-g32-dq2-fp32-64",
    "nf3-g16-dq3-bf16-16",
    "nf4-g64-dq8-fp16-256",
    "nf8-g64-dq4-bf16-16",
    "nf2-g16-dq3-fp16-256",
)
# K 100 is padded by every blocked format; 576 takes blocks of 64 where 128 is asked for; 64 is one block.
SHAPES = ((24, 128), (23, 100), (17, 576), (9, 64))
IDS = np.array([[3, 1, 2], [0, 8, 1]])


def matrix_of(fmt: str, N: int, K: int) -> QuantizedMatrix:
    return encode(torch.randn(N, K, generator=torch.Generator().manual_seed(N * K)) * 0.05, fmt)


def write(directory: Path, matrix: QuantizedMatrix, form: GraphForm, head: bool) -> Path:
    """Write a graph with outputs weight [K, N], rows [B, S, K] and, with `head`, the transposed table [K, N]."""
    with WeightFile(directory) as weights:
        graph = GraphBuilder(form, weights)
        ids = graph.input("ids", ir.DataType.INT64, ["B", "S"])
        graph.output(write_matrix(graph, "m", matrix), graph.activations, [matrix.K, matrix.N])
        table = write_table(graph, "t", matrix, head)
        graph.output(table.rows(ids), graph.activations, ["B", "S", matrix.K])
        assert (table.weight is not None) == head
        if table.weight is not None:
            graph.output(table.weight, graph.activations, [matrix.K, matrix.N])
    graph.save(directory)
    return directory / form.file


def check(outputs: list[Any], matrix: QuantizedMatrix, activations: str) -> None:
    want = decode(matrix, TORCH_DTYPES[activations]).numpy()
    for got, expected in zip(outputs, (want.T, want[IDS], want.T), strict=False):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, expected)


def run_cpu(path: Path) -> list[Any]:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return list(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {"ids": IDS}))


@pytest.mark.parametrize("activations", ["float32", "float16"])
@pytest.mark.parametrize("fmt", PLAIN + DOUBLE)
def test_cpu_form_is_exact_in_onnx_runtime(tmp_path: Path, fmt: str, activations: str) -> None:
    for N, K in SHAPES:
        for head in (False, True):
            matrix = matrix_of(fmt, N, K)
            check(
                run_cpu(write(tmp_path, matrix, GraphForm("cpu", "cpu.onnx", activations), head)), matrix, activations
            )


@pytest.mark.parametrize("activations", ["float32", "float16"])
@pytest.mark.parametrize("fmt", PLAIN + DOUBLE)
def test_engine_form_is_exact_in_the_reference_evaluator(tmp_path: Path, fmt: str, activations: str) -> None:
    for N, K in SHAPES:
        matrix = matrix_of(fmt, N, K)
        path = write(tmp_path, matrix, GraphForm("engine", "base.onnx", activations, 8), head=True)
        check(ReferenceEvaluator(onnx.load(path)).run(None, {"ids": IDS}), matrix, activations)


def with_own_levels(fmt: str, N: int, K: int) -> QuantizedMatrix:
    """Return a matrix with uneven levels of its own, none of them zero."""
    matrix, count = matrix_of(fmt, N, K), 1 << int(fmt[2])
    steps = torch.rand(count, generator=torch.Generator().manual_seed(N)) + 0.2
    return replace(matrix, levels=(steps.cumsum(0) / steps.sum() * 2 - 1.03).half())


@pytest.mark.parametrize("activations", ["float32", "float16"])
@pytest.mark.parametrize("fmt", ["nf2-g16", "nf3-g32", "nf4-g64", "nf2-g16-dq3-fp16-256", "nf3-g16-dq4-bf16-16"])
def test_levels_of_a_matrixs_own_are_exact_in_both_forms(tmp_path: Path, fmt: str, activations: str) -> None:
    for N, K in SHAPES:
        matrix = with_own_levels(fmt, N, K)
        assert not torch.equal(decode(matrix), decode(matrix_of(fmt, N, K)))
        for head in (False, True):
            path = write(tmp_path, matrix, GraphForm("cpu", "cpu.onnx", activations), head)
            check(run_cpu(path), matrix, activations)
        path = write(tmp_path, matrix, GraphForm("engine", "base.onnx", activations, 8), head=True)
        check(ReferenceEvaluator(onnx.load(path)).run(None, {"ids": IDS}), matrix, activations)


@pytest.mark.parametrize("activations", ["float32", "float16"])
@pytest.mark.parametrize("fmt", ["int4-g32", "nvfp4", "nf2-g16", "nf3-g32", "nf4-g64", "nf3-g16-dq4-bf16-16"])
def test_refined_codes_are_exact_in_both_forms(tmp_path: Path, fmt: str, activations: str) -> None:
    x = torch.randn(300, 100, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(23, 100, generator=torch.Generator().manual_seed(3)) * 0.05
    matrix = encode(weight, fmt, "refined", x.T @ x / 300, 300)
    assert (matrix.levels is not None) == fmt.startswith(("nf2", "nf3"))
    check(run_cpu(write(tmp_path, matrix, GraphForm("cpu", "cpu.onnx", activations), True)), matrix, activations)
    path = write(tmp_path, matrix, GraphForm("engine", "base.onnx", activations, 8), head=True)
    check(ReferenceEvaluator(onnx.load(path)).run(None, {"ids": IDS}), matrix, activations)


def test_matrices_of_one_graph_keep_their_own_levels(tmp_path: Path) -> None:
    matrices = [matrix_of("nf3-g32", 24, 128), *(with_own_levels("nf3-g32", N, 128) for N in (24, 32))]
    for form in (GraphForm("cpu", "cpu.onnx", "float16"), GraphForm("engine", "base.onnx", "float16", 8)):
        with WeightFile(tmp_path) as weights:
            graph = GraphBuilder(form, weights)
            for i, matrix in enumerate(matrices):
                graph.output(write_matrix(graph, f"m{i}", matrix), graph.activations, [matrix.K, matrix.N])
        graph.save(tmp_path)
        found = ReferenceEvaluator(onnx.load(tmp_path / form.file)).run(None, {})
        for got, matrix in zip(found, matrices, strict=True):
            np.testing.assert_array_equal(got, decode(matrix, torch.float16).numpy().T)


@pytest.mark.parametrize("activations", ["float32", "float16"])
def test_nvfp4_with_the_tensor_scale_of_another_tool(tmp_path: Path, activations: str) -> None:
    matrix = replace(matrix_of("nvfp4", 24, 128), constant=0.0003153483)
    path = write(tmp_path, matrix, GraphForm("cpu", "cpu.onnx", activations), head=True)
    check(run_cpu(path), matrix, activations)
    path = write(tmp_path, matrix, GraphForm("engine", "base.onnx", activations, 8), head=True)
    check(ReferenceEvaluator(onnx.load(path)).run(None, {"ids": IDS}), matrix, activations)


@pytest.mark.parametrize("fmt", ["int4-g64", "int8-g64", "nvfp4", "int4-g32"])
def test_engine_blocks_are_whole(tmp_path: Path, fmt: str) -> None:
    # TensorRT infers the block as length / scales: a short last block would change every block, without an error.
    matrix = matrix_of(fmt, 23, 100)
    path = write(tmp_path, matrix, GraphForm("engine", "base.onnx", "float16", 8), head=True)
    graph = onnx.load(path, load_external_data=False).graph
    lengths = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    blocked = 0
    for node in graph.node:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if attributes.get("block_size"):
            blocked += 1
            assert lengths[node.input[0]][attributes["axis"]] % matrix.format.block == 0
    assert blocked == 2


@settings(max_examples=12, deadline=None)
@given(fmt=st.sampled_from(PAPER_FORMATS), N=st.integers(9, 40), K=st.integers(1, 200))
def test_any_paper_format_is_exact(tmp_path_factory: pytest.TempPathFactory, fmt: Any, N: int, K: int) -> None:
    directory = tmp_path_factory.mktemp("paper")
    matrix = matrix_of(str(fmt), N, K)
    for form in (GraphForm("cpu", "cpu.onnx", "float32"), GraphForm("engine", "base.onnx", "float32", 8)):
        check(run_cpu(write(directory, matrix, form, True)), matrix, "float32")


@pytest.mark.parametrize("fmt", ["int4-g64", "int8-g64", "int8", "fp8", "nvfp4", "nf3-g32"])
def test_engine_constants_are_read_by_dequantize_linear_only(tmp_path: Path, fmt: str) -> None:
    path = write(tmp_path, matrix_of(fmt, 24, 128), GraphForm("engine", "base.onnx", "float16", 8), head=True)
    graph = onnx.load(path, load_external_data=False).graph
    types = onnx.TensorProto
    small = {types.INT8, types.INT4, types.FLOAT8E4M3FN, types.FLOAT4E2M1}
    quantized = {tensor.name for tensor in graph.initializer if tensor.data_type in small}
    readers = {node.op_type for node in graph.node if quantized & set(node.input)}
    assert quantized
    assert readers == {"DequantizeLinear"}


def test_every_kind_has_a_storage() -> None:
    assert set(STORAGES) == set(KINDS)


@given(codes=st.lists(st.integers(0, 15), min_size=1, max_size=33))
def test_nibbles_match_the_onnx_packing(codes: list[int]) -> None:
    import ml_dtypes
    from onnx import numpy_helper

    want = numpy_helper.from_array(np.array(codes, np.uint8).astype(ml_dtypes.uint4), "x").raw_data
    assert nibbles(torch.tensor(codes, dtype=torch.uint8)).numpy().tobytes() == want


@given(width=st.sampled_from([1, 2, 4, 8]), shift=st.integers(0, 2), seed=st.integers(0, 99), axis=st.integers(0, 1))
def test_planes_unpack_to_the_codes(width: int, shift: int, seed: int, axis: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 256, (24, 16)).astype(np.uint8)
    packed = pack_plane(torch.from_numpy(codes), shift, width, axis).numpy().astype(np.int64) + 128
    parts = [packed >> (width * i) & ((1 << width) - 1) for i in range(8 // width)]
    np.testing.assert_array_equal(np.concatenate(parts, axis), codes >> shift & ((1 << width) - 1))
