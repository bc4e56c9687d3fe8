"""The decoding of `coatrt.quantization.codec` reimplemented in numpy; results are equal bit for bit."""

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from coatrt.quantization.codebooks import codebook
from coatrt.quantization.codec import QuantizedMatrix
from coatrt.quantization.weight_format import WeightFormat

__all__ = ["decode_in_numpy", "decode_numpy"]

_OWN_DTYPES = {  # numpy lacks them
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
}


def decode_numpy(
    weight_format: WeightFormat,
    shape: tuple[int, int],
    codes: NDArray[Any],
    scales: NDArray[Any] | None = None,
    super_scales: NDArray[Any] | None = None,
    constant: float = 0.0,
    dtype: DTypeLike = np.float32,
    levels: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return the weight of codes and scales.

    Args:
        weight_format: the effective format.
        shape: (N, K).
        codes: as in `QuantizedMatrix`; fp8 codes and nvfp4 scales as ml_dtypes float8_e4m3fn,
            bf16 as ml_dtypes bfloat16.
        scales: as in `QuantizedMatrix`.
        super_scales: as in `QuantizedMatrix`.
        constant: as in `QuantizedMatrix`.
        dtype: float32 or float16; all arithmetic is rounded to it.
        levels: as in `QuantizedMatrix`.

    Returns:
        [N, K] in `dtype`.
    """
    N, K = shape
    kind = np.dtype(dtype)
    if scales is None:
        return codes.astype(kind)
    indexed = weight_format.is_normal_float or weight_format.kind == "nvfp4"
    table = codebook(weight_format.kind) if indexed and levels is None else levels
    level = table.astype(kind)[codes.astype(np.intp)] if table is not None else codes.astype(kind)
    scale = scales.astype(kind)
    if weight_format.kind == "nvfp4":
        scale = scale * np.array(constant, kind)
    elif super_scales is not None:
        scale = scale * super_scales.astype(kind)[:, None] + np.array(constant, kind)
        scale = scale.reshape(-1)[: N * codes.shape[1] // weight_format.block].reshape(N, -1)
    weight: NDArray[Any] = (level.reshape(N, scale.shape[1], -1) * scale[:, :, None]).reshape(N, -1)[:, :K]
    return weight


def decode_in_numpy(matrix: QuantizedMatrix, dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Return `decode_numpy` of an encoded matrix, [N, K] in `dtype`."""
    fields: dict[str, Any] = {name: _array(tensor) for name, tensor in matrix.tensors.items()}
    return decode_numpy(matrix.format, (matrix.N, matrix.K), constant=matrix.constant, dtype=dtype, **fields)


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    bits, dtype = _OWN_DTYPES.get(tensor.dtype, (tensor.dtype, None))
    array: NDArray[Any] = tensor.view(bits).numpy()
    return array if dtype is None else array.view(dtype)
