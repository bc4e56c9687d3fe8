"""A graph with many copies of one product, each with its own weight, so that no weight is cached when it is used."""

from dataclasses import replace
from pathlib import Path

import torch

from coatrt.export.graph import GraphBuilder, GraphForm
from coatrt.export.weight_file import WeightFile
from coatrt.export.weights import write_matrix
from coatrt.quantization.codec import encode
from coatrt.quantization.weight_format import WeightFormat

__all__ = ["copies_of", "write_products"]

_PACKED = ("int4", "int8")  # ONNX Runtime decodes all other formats when it loads a graph


def copies_of(K: int, N: int, fmt: WeightFormat, working_set: int, limits: tuple[int, int], element: int) -> int:
    """Return how many copies of a weight fill the working set, within limits; `element`: bytes per decoded weight."""
    stored = fmt.nbytes(N, K) if fmt.kind in _PACKED else element * N * K
    return int(min(max(working_set // stored, limits[0]), limits[1]))


def write_products(directory: Path, form: GraphForm, K: int, N: int, fmt: WeightFormat, copies: int) -> Path:
    """Write products x·W_i as in a decoder graph, with rolled copies W_i of one weight; return the file.

    The copies are rolled because a weights file stores equal bytes once. The cpu form outputs the sum y; the cuda form
    outputs each product, y0, y1 …, as a sum would add kernels.
    """
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) / K**0.5
    matrix = encode(weight, fmt, "absmax")
    with WeightFile(directory) as weights:
        graph = GraphBuilder(form, weights)
        x = graph.input("x", graph.activations, ["T", K])
        parts = []
        for copy in range(copies):
            copied = replace(matrix, codes=_roll(matrix.codes, copy))
            parts.append(graph.op("MatMul", [x, write_matrix(graph, f"w{copy}", copied)], f"y{copy}"))
        for value in parts if graph.is_cuda else [graph.op("Sum", parts, "y")]:
            graph.output(value, graph.activations, ["T", N])
    graph.save(directory)
    return directory / form.file


def _roll(codes: torch.Tensor, rows: int) -> torch.Tensor:
    """Return codes rolled along their rows; 8-bit floats as bytes, which torch can roll."""
    plain = codes.view(torch.uint8) if codes.element_size() == 1 else codes
    return plain.roll(rows, 0).view(codes.dtype)
