"""How much of the training data a run calibrates on, and whether that is enough."""

import math

from coatrt.data.task_data import TaskData
from coatrt.models.matrices import ModelMatrices
from coatrt.quantization.input_moments import tokens_wanted
from coatrt.quantization.quantizers import FED_BACK
from coatrt.training.options import TrainOptions

__all__ = ["SENSITIVITY_BLOCKS", "calibration_blocks", "few_tokens_notice"]

SENSITIVITY_BLOCKS = 16
"""Blocks for the sensitivities where no number is given: 4,096 tokens; with 1,024 they rank well (docs/method.md)."""


def calibration_blocks(options: TrainOptions, model: ModelMatrices) -> int:
    """Return the blocks whose second moments the quantizer sees."""
    if options.calibration is not None:
        return options.calibration
    wanted = tokens_wanted(model) if options.quantizer in FED_BACK else 0
    return max(SENSITIVITY_BLOCKS, math.ceil(wanted / options.max_length))


def few_tokens_notice(options: TrainOptions, model: ModelMatrices, data: TaskData) -> str | None:
    """Return a line that says error feedback is calibrated on too few tokens; None where they suffice.

    Args:
        options: of the training.
        model: its matrices.
        data: what it trains on.
    """
    if options.quantizer not in FED_BACK:
        return None
    most = calibration_blocks(options, model) * options.max_length
    tokens, wanted = min(int((data.train.last + 1).sum()), most), tokens_wanted(model)
    if tokens >= wanted:
        return None
    return (
        f"{options.quantizer} is calibrated on {tokens:,} tokens; this model needs {wanted:,}: "
        "give more --data or a larger --calibration"
    )
