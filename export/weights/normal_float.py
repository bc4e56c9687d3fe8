"""NormalFloat of 2, 3, 4 or 8 bits: packed planes, a Gather on the codebook, a multiplication by the scales."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from coatrt.export.graph import GraphBuilder
from coatrt.export.weights.base import Rows, scale_rows, scale_weight, transpose
from coatrt.export.weights.packing import PackedCodes
from coatrt.export.weights.scales import write_scales
from coatrt.quantization.codec import QuantizedMatrix

__all__ = ["rows", "weight"]


def weight(graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> ir.Value:
    """Return the weight [K, N]; planes are packed along K."""
    codes = PackedCodes.store(graph, f"{name}.codes", transpose(matrix.codes), matrix.format.bits, axis=0)
    levels = codes.lookup(_levels(matrix), None, name, matrix.levels is not None)
    return scale_weight(graph, levels, write_scales(graph, name, matrix, by_rows=False), matrix, name)


def rows(graph: GraphBuilder, name: str, matrix: QuantizedMatrix) -> Rows:
    """Return the table's reader; planes are packed along the hidden axis, so that only the rows read are unpacked."""
    prefix = f"{name}.table"
    codes = PackedCodes.store(graph, f"{prefix}.codes", matrix.codes, matrix.format.bits, axis=1)
    scales = write_scales(graph, prefix, matrix, by_rows=True)

    def read(ids: ir.Value | None, label: str) -> ir.Value:
        levels = codes.lookup(_levels(matrix), ids, label, matrix.levels is not None)
        return scale_rows(graph, levels, scales, matrix, ids, label)

    return read


def _levels(matrix: QuantizedMatrix) -> NDArray[np.float32]:
    """Return the matrix's own levels, or those of its kind."""
    levels = matrix.grid.levels
    assert levels is not None
    return levels.numpy()
