"""Names of the quantizers, importable without torch; `coatrt.quantization.codec.encode` implements them."""

from typing import Literal, get_args

__all__ = ["CALIBRATED", "FEEDBACK", "QUANTIZERS", "QUANTIZER_VERSION", "Quantizer"]

QUANTIZER_VERSION = 5  # increase it if encode returns other codes: it is part of cache keys
Quantizer = Literal["absmax", "mse", "weighted", "gptq", "feedback", "refined"]
"""Choice of scales and codes, see `coatrt.quantization.codec.encode`."""

QUANTIZERS: tuple[Quantizer, ...] = get_args(Quantizer)
CALIBRATED: frozenset[Quantizer] = frozenset({"weighted", "gptq", "feedback", "refined"})
"""Quantizers that need the second moment of a matrix's input."""
FEEDBACK: frozenset[Quantizer] = frozenset({"gptq", "feedback", "refined"})
"""Quantizers with error feedback, which need many calibration tokens."""
