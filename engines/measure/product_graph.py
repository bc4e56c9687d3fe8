"""A graph of one product many times, each with a weight of its own: none finds its weight in a cache."""

from dataclasses import replace
from pathlib import Path

import torch

from coatrt.export.graph import GraphBuilder, GraphForm
from coatrt.export.weight_file import WeightFile
from coatrt.export.weights import write_matrix
from coatrt.quantization.codec import encode
from coatrt.quantization.weight_format import WeightFormat

__all__ = ["copies_of", "write_products"]

_PACKED = ("int4", "int8")  # ONNX Runtime decodes the others when it loads a graph


def copies_of(K: int, N: int, fmt: WeightFormat, working_set: int, limits: tuple[int, int], element: int) -> int:
    """Return how many copies of a weight fill the working set, within limits; a decoded weight has `element` bytes."""
    stored = fmt.nbytes(N, K) if fmt.kind in _PACKED else element * N * K
    return int(min(max(working_set // stored, limits[0]), limits[1]))


def write_products(directory: Path, form: GraphForm, K: int, N: int, fmt: WeightFormat, copies: int) -> Path:
    """Write x·W_i with turned copies of one weight, as a decoder graph has its products; return the file.

    The copies have other bytes, as a weights file stores equal ones once. The cpu form has their sum as its output y;
    the cuda form an output y0, y1 … each, as a sum would be a kernel more for each.
    """
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) / K**0.5
    matrix = encode(weight, fmt, "absmax")
    with WeightFile(directory) as weights:
        graph = GraphBuilder(form, weights)
        x = graph.input("x", graph.activations, ["T", K])
        parts = []
        for copy in range(copies):
            turned = replace(matrix, codes=_turned(matrix.codes, copy))
            parts.append(graph.op("MatMul", [x, write_matrix(graph, f"w{copy}", turned)], f"y{copy}"))
        for value in parts if graph.is_cuda else [graph.op("Sum", parts, "y")]:
            graph.output(value, graph.activations, ["T", N])
    graph.save(directory)
    return directory / form.file


def _turned(codes: torch.Tensor, rows: int) -> torch.Tensor:
    """Return codes with their rows turned; 8-bit floats turn as bytes."""
    plain = codes.view(torch.uint8) if codes.element_size() == 1 else codes
    return plain.roll(rows, 0).view(codes.dtype)
