"""A random matrix as coatrt writes it into a graph for an engine, the reference for the packed products."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from coatrt.export.graph import GraphBuilder, GraphForm
from coatrt.export.weight_file import WeightFile
from coatrt.export.weights import write_matrix
from coatrt.quantization.codec import decode, encode

__all__ = ["StoredWeight", "stored_weight"]


@dataclass(frozen=True)
class StoredWeight:
    """A random matrix as coatrt writes it into a graph for an engine.

    Args:
        codes: [Kp, N], as bytes, unpacked.
        planes: the bytes of its constants, low bits first.
        scales: [blocks, N] float16, or uint8 E4M3 for nvfp4.
        block: weights along K that share a scale; 0: one scale per column.
        constant: the power of two that nvfp4 multiplies its scales with.
        levels: the levels of NormalFloat, float16.
        dense: [K, N] float16, as coatrt decodes it.
    """

    codes: NDArray[np.uint8]
    planes: list[bytes]
    scales: NDArray[Any]
    block: int
    constant: float
    levels: NDArray[np.float16] | None
    dense: NDArray[np.float16]


def stored_weight(text: str, N: int, K: int) -> StoredWeight:
    """Encode a random matrix and return what its graph stores."""
    matrix = encode(torch.randn(N, K, generator=torch.Generator().manual_seed(N * K)) * 0.05, text)
    form = GraphForm("engine", "weight.onnx", "float16", 8)
    with tempfile.TemporaryDirectory() as scratch:
        with WeightFile(Path(scratch)) as weights:
            graph = GraphBuilder(form, weights)
            graph.output(write_matrix(graph, "m", matrix), graph.activations, [K, N])
        graph.save(Path(scratch))
        constants = {tensor.name: tensor for tensor in onnx.load(Path(scratch) / form.file).graph.initializer}
    raw = {name.removeprefix("m.weight."): tensor.raw_data for name, tensor in constants.items()}
    names = sorted(name for name in raw if name == "codes" or name.startswith("codes.plane"))
    kind, levels = matrix.format.kind, matrix.grid.levels
    return StoredWeight(
        matrix.codes.view(torch.uint8).T.contiguous().numpy(),
        [raw[name] for name in names],
        np.frombuffer(raw["scales"], np.uint8 if kind == "nvfp4" else np.float16).reshape(-1, N),
        matrix.format.block,
        matrix.constant,
        levels.numpy().astype(np.float16) if levels is not None and matrix.format.is_normal_float else None,
        decode(matrix, torch.float16).T.contiguous().numpy(),
    )
