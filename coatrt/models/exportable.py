"""Checks of an export that run before training: tensors and widths."""

import torch

from coatrt.errors import CheckpointError
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.config_file import end_tokens
from coatrt.models.matrices import EMBEDDING, HEAD
from coatrt.models.modules import empty_model
from coatrt.models.spec import DecoderSpec

__all__ = ["check_exportable", "check_tensors"]


def check_exportable(checkpoint: Checkpoint, spec: DecoderSpec) -> None:
    """Refuse a model that the export would refuse.

    Args:
        checkpoint: the model.
        spec: what it computes.

    Raises:
        ConfigError: its end tokens are invalid.
        CheckpointError: see `check_tensors`; or ONNX Runtime's attention does not support the width of its heads.
    """
    if spec.head_dim % 8:
        raise CheckpointError(
            f"{checkpoint.directory} has heads of {spec.head_dim} dimensions, but ONNX Runtime's attention needs a "
            "multiple of 8; use another model"
        )
    check_tensors(checkpoint)
    end_tokens(checkpoint.directory, checkpoint.config)


def check_tensors(checkpoint: Checkpoint) -> None:
    """Refuse a model whose tensors differ from those of transformers' modules.

    Raises:
        CheckpointError: tensors are missing, unused or of another shape, or a tied head has its own values.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in empty_model(checkpoint).state_dict().items()}
    stored = {
        name: tensor.shape for name, tensor in checkpoint.tensors.items() if not name.endswith("rotary_emb.inv_freq")
    }
    table, head = f"{EMBEDDING}.weight", f"{HEAD}.weight"
    if checkpoint.matrices.tied:
        expected.pop(head, None)
        if head in stored:
            _check_tied_head(checkpoint, table, head)
            del stored[head]
    for what, names in (
        ("unused", stored.keys() - expected.keys()),
        ("missing", expected.keys() - stored.keys()),
    ):
        if names:
            raise CheckpointError(
                f"{checkpoint.directory}: {len(names)} tensors {what} for its family and config.json, like "
                f"{', '.join(sorted(names)[:3])}; correct config.json or give a plain checkpoint of the family"
            )
    for name, shape in expected.items():
        if stored[name] != shape:
            raise CheckpointError(
                f"{checkpoint.directory}: {name} has the shape {list(stored[name])}, config.json says {list(shape)}; "
                "correct config.json or download the model again"
            )
        if len(shape) < 2:  # matrices are read before the first step; reading refuses values that are not finite
            checkpoint.tensor(name)


def _check_tied_head(checkpoint: Checkpoint, table: str, head: str) -> None:
    """Refuse a tied head whose values differ from the table's: transformers would use the head's."""
    if not torch.equal(checkpoint.tensor(table), checkpoint.tensor(head)):
        raise CheckpointError(
            f"{checkpoint.directory}: tie_word_embeddings is true and {head} has other values than {table}; "
            "set it to false in config.json, or remove the tensor"
        )
