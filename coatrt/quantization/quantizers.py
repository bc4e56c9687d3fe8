"""Names of the quantizers, importable without torch; `coatrt.quantization.codec.encode` implements them."""

from typing import Literal, get_args

__all__ = ["CALIBRATED", "FEEDBACK", "LAYERWISE_BITS", "QUANTIZERS", "QUANTIZER_VERSION", "REFINED", "Quantizer"]

QUANTIZER_VERSION = 4  # increase it if encode returns other codes: it is part of cache keys
Quantizer = Literal["absmax", "mse", "weighted", "gptq", "feedback", "refined", "layerwise"]
"""Choice of scales and codes, see `coatrt.quantization.codec.encode`."""

QUANTIZERS: tuple[Quantizer, ...] = get_args(Quantizer)
CALIBRATED: frozenset[Quantizer] = frozenset({"weighted", "gptq", "feedback", "refined", "layerwise"})
"""Quantizers that need the second moment of a matrix's input."""
FEEDBACK: frozenset[Quantizer] = frozenset({"gptq", "feedback", "refined", "layerwise"})
"""Quantizers with error feedback, which need many calibration tokens."""
REFINED: frozenset[Quantizer] = frozenset({"refined", "layerwise"})
"""Quantizers that improve levels, scales and codes after error feedback."""
LAYERWISE_BITS = 4
"""Maximum bits of a code in the formats that "layerwise" encodes layer by layer; the others are as under "refined"."""
