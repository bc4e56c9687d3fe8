"""What makes an export refuse a model, asked before it is trained: names of tensors and widths, no values."""

import re

from coatrt.errors import CheckpointError
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.matrices import HEAD
from coatrt.models.spec import DecoderSpec

__all__ = ["check_exportable"]

_LAYER = r"model\.layers\.\d+\."
_SMALL = re.compile(
    rf"(model\.norm|{_LAYER}(input|post_attention|post_feedforward)_layernorm|{_LAYER}self_attn\.[qk]_norm)\.(weight|bias)"
    r"|.*rotary_emb\.inv_freq"
)
"""Tensors beside the matrices that the graph of some family reads."""


def check_exportable(checkpoint: Checkpoint, spec: DecoderSpec) -> None:
    """Refuse a model that the exporter would refuse.

    Args:
        checkpoint: the model.
        spec: what it computes.

    Raises:
        CheckpointError: it has tensors that no graph of a family uses, or heads of a width that ONNX Runtime's
            attention does not take.
    """
    if spec.head_dim % 8:
        raise CheckpointError(
            f"{checkpoint.directory} has heads of {spec.head_dim} dimensions; ONNX Runtime's attention takes multiples "
            "of 8; give another model"
        )
    names = checkpoint.matrices.names
    known = {f"{name}.{part}" for name in names for part in ("weight", "bias")} | {f"{HEAD}.weight"}
    strays = sorted(name for name in checkpoint.files if name not in known and not _SMALL.fullmatch(name))
    if strays:
        raise CheckpointError(
            f"{checkpoint.directory} has {len(strays)} tensors that a graph of the family {spec.family} does not use, "
            f"like {', '.join(strays[:3])}; give a plain checkpoint of the family"
        )
