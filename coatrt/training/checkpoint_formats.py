"""The formats that a quantized checkpoint brings to a training."""

from collections.abc import Mapping

from coatrt.models.checkpoint import Checkpoint
from coatrt.training.options import TrainOptions

__all__ = ["checkpoint_formats", "checkpoint_notice"]


def checkpoint_formats(checkpoint: Checkpoint, options: TrainOptions) -> Mapping[str, str]:
    """Return matrix → format that a quantized checkpoint stores it in; empty for a plain model.

    A matrix of 16 bits takes fp16 instead of bf16 if the options name fp16 alone.
    """
    has_fp16 = "fp16" in options.formats and "bf16" not in options.formats
    return {name: "fp16" if text == "bf16" and has_fp16 else text for name, text in checkpoint.formats.items()}


def checkpoint_notice(checkpoint: Checkpoint, options: TrainOptions) -> str | None:
    """Return a line about a quantized checkpoint: what is kept of it, and formats it adds; None for a plain model."""
    if checkpoint.codes is None:
        return None
    formats = checkpoint_formats(checkpoint, options).values()
    added = [text for text in dict.fromkeys(formats) if text not in options.formats]
    return checkpoint.codes.line + (f"; formats added for it: {', '.join(added)}" if added else "")
