"""A matrix in the types of GGUF: which of them hold a format's values exactly, and their bytes."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from coatrt.quantization.codec import QuantizedMatrix, decode

__all__ = ["GgufTensor", "gguf_tensor"]

_BLOCK = 32  # weights that share a scale in Q8_0 and Q4_0


class GgufTensor(NamedTuple):
    """A tensor as a GGUF file stores it.

    Args:
        type: name of its type: Q8_0, Q4_0, F16, BF16.
        data: uint8 [N, bytes of a row].
    """

    type: str
    data: NDArray[Any]


def gguf_tensor(matrix: QuantizedMatrix, order: torch.Tensor | None = None) -> GgufTensor:
    """Return a matrix in the GGUF type that holds it: the values of `decode`, in F16 rounded to float16.

    int4 and int8 of any block are Q4_0 and Q8_0, whose blocks of 32 repeat the scale; all else takes 16 bits.

    Args:
        matrix: the matrix.
        order: int64 [N], order of its rows; None: unchanged.
    """
    fmt = matrix.format
    if fmt.kind in ("int4", "int8") and matrix.K % _BLOCK == 0 and fmt.padded(matrix.K) == matrix.K:
        return _blocks(matrix, order)
    if fmt.kind == "bf16":
        rows = matrix.codes if order is None else matrix.codes[order]
        return GgufTensor("BF16", rows.contiguous().view(torch.uint8).numpy())
    values = decode(matrix, torch.float16)
    values = values if order is None else values[order]
    return GgufTensor("F16", values.contiguous().view(torch.uint8).numpy())


def _blocks(matrix: QuantizedMatrix, order: torch.Tensor | None) -> GgufTensor:
    """Return Q8_0 (scale, 32 codes) or Q4_0 (scale, 16 bytes: code i low and code i + 16 high, each plus 8)."""
    assert matrix.scales is not None
    codes, scales = matrix.codes, matrix.scales
    if order is not None:
        codes, scales = codes[order], scales[order]
    count = matrix.K // _BLOCK
    scales = scales.repeat_interleave(count // scales.shape[1], 1).contiguous()
    blocks = codes.view(matrix.N, count, _BLOCK)
    if matrix.format.kind == "int4":
        nibbles = (blocks + 8).to(torch.uint8)
        blocks = nibbles[..., :16] | (nibbles[..., 16:] << 4)
    parts = [scales.view(torch.uint8).view(matrix.N, count, 2), blocks.contiguous().view(torch.uint8)]
    data = np.concatenate([part.numpy() for part in parts], axis=2).reshape(matrix.N, -1)
    return GgufTensor("Q4_0" if matrix.format.kind == "int4" else "Q8_0", data)
