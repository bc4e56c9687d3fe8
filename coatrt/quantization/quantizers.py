"""The quantizers by name, read without torch; `coatrt.quantization.codec.encode` is what they do."""

from typing import Literal, get_args

__all__ = ["CALIBRATED", "FED_BACK", "QUANTIZERS", "QUANTIZER_VERSION", "Quantizer"]

QUANTIZER_VERSION = 3  # raise when encode gives other codes: caches are keyed by it
Quantizer = Literal["absmax", "mse", "weighted", "gptq", "feedback"]
"""How scales and codes are chosen, see `coatrt.quantization.codec.encode`."""

QUANTIZERS: tuple[Quantizer, ...] = get_args(Quantizer)
CALIBRATED: frozenset[Quantizer] = frozenset({"weighted", "gptq", "feedback"})
"""Quantizers that need the second moment of the matrix's input."""
FED_BACK: frozenset[Quantizer] = frozenset({"gptq", "feedback"})
"""Those of them whose codes make up for each other's errors, and that want many tokens."""
