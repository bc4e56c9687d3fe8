"""The values of codes: NormalFloat levels and the FP4 (E2M1) grid."""

from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

__all__ = ["E2M1", "codebook", "normal_float"]

_OFFSET = 0.9677083  # the largest quantile of QLoRA (arXiv 2305.14314, its published create_normal_map)

E2M1: NDArray[np.float32] = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""FP4 values by code: sign bit above two exponent bits and one mantissa bit (OCP Microscaling Formats 1.0)."""


@lru_cache
def normal_float(bits: int) -> NDArray[np.float32]:
    """Return the 2^bits NormalFloat levels in [-1, 1], ascending.

    2^(b-1) quantiles of the standard normal from 1 - offset to 0.5 and 2^(b-1) + 1 from 0.5 to the offset, the shared
    0.5 counted once, divided by the largest (QLoRA, arXiv 2305.14314; bits 2, 3 and 8 as in arXiv 2509.25214).

    Args:
        bits: 2, 3, 4 or 8.

    Returns:
        float32 array of 2^bits levels; level 2^(b-1) - 1 is exactly zero.
    """
    half = 1 << (bits - 1)
    lower = np.linspace(1 - _OFFSET, 0.5, half)[:-1]
    quantiles = np.concatenate([lower, np.linspace(0.5, _OFFSET, half + 1)])
    levels = np.array([NormalDist().inv_cdf(quantile) for quantile in quantiles])
    levels[half - 1] = 0.0
    result: NDArray[np.float32] = (levels / np.abs(levels).max()).astype(np.float32)
    result.setflags(write=False)
    return result


def codebook(kind: str) -> NDArray[np.float32]:
    """Return the levels by code of a codebook kind: nf2, nf3, nf4, nf8 or nvfp4."""
    return E2M1 if kind == "nvfp4" else normal_float(int(kind[2:]))
