"""The weights that a configuration gives a model, encoded matrix by matrix without the code cache."""

import torch
from torch import Tensor

from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.codec import decode, encode
from coatrt.quantization.input_moments import InputMoments
from coatrt.quantization.quantizers import Quantizer
from coatrt.quantization.weight_format import WeightFormat

__all__ = ["quantized_weight"]


def quantized_weight(
    checkpoint: Checkpoint, name: str, weight_format: WeightFormat | str, quantizer: Quantizer, moments: InputMoments
) -> Tensor:
    """Return the decoded weight [N, K] of a matrix; "refined" encodes the matrices of a fused group as one.

    Args:
        checkpoint: source of the weights.
        name: the matrix.
        weight_format: its format.
        quantizer: one that needs second moments.
        moments: second moments of the inputs.
    """
    names, fmt = (name,), WeightFormat.parse(weight_format)
    if quantizer == "refined" and not fmt.scale_bits:
        names = next(group for group in checkpoint.matrices.groups if name in group)
    weights = [checkpoint.tensor(f"{other}.weight") for other in names]
    tokens = moments.calibration.tokens.numel()
    whole = decode(encode(torch.cat(weights), fmt, quantizer, moments.get(name), tokens))
    parts = whole.split([len(weight) for weight in weights])
    return parts[names.index(name)]
