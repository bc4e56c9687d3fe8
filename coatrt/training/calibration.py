"""The size of a training run's calibration, and a warning if it is too small."""

import math

from coatrt.data.task_data import TaskData
from coatrt.models.matrices import ModelMatrices
from coatrt.quantization.input_moments import required_tokens
from coatrt.quantization.quantizers import FEEDBACK
from coatrt.training.options import TrainOptions

__all__ = ["SENSITIVITY_BLOCKS", "calibration_blocks", "few_tokens_notice"]

SENSITIVITY_BLOCKS = 16
"""Default blocks for the sensitivities: 4,096 tokens; 1,024 already rank formats well (docs/evidence/planning.md)."""


def calibration_blocks(options: TrainOptions, model: ModelMatrices) -> int:
    """Return the number of blocks for the second moments of the quantizer."""
    if options.calibration is not None:
        return options.calibration
    required = required_tokens(model) if options.quantizer in FEEDBACK else 0
    return max(SENSITIVITY_BLOCKS, math.ceil(required / options.max_length))


def few_tokens_notice(options: TrainOptions, model: ModelMatrices, data: TaskData) -> str | None:
    """Return a warning if error feedback has too few calibration tokens, else None.

    Args:
        options: options of the training.
        model: matrices of the model.
        data: data of the training.
    """
    if options.quantizer not in FEEDBACK:
        return None
    limit = calibration_blocks(options, model) * options.max_length
    tokens, required = min(int((data.train.last + 1).sum()), limit), required_tokens(model)
    if tokens >= required:
        return None
    return (
        f"{options.quantizer} is calibrated on {tokens:,} tokens; this model needs {required:,}: "
        "give more --data or a larger --calibration"
    )
