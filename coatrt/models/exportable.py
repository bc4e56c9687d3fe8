"""What makes an export refuse a model, asked before it is trained: tensors and widths."""

import torch

from coatrt.errors import CheckpointError
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.config_file import end_tokens
from coatrt.models.matrices import EMBEDDING, HEAD
from coatrt.models.modules import empty_model
from coatrt.models.spec import DecoderSpec

__all__ = ["check_exportable", "check_tensors"]


def check_exportable(checkpoint: Checkpoint, spec: DecoderSpec) -> None:
    """Refuse a model that the exporter would refuse.

    Args:
        checkpoint: the model.
        spec: what it computes.

    Raises:
        ConfigError: its end tokens cannot be read.
        CheckpointError: see `check_tensors`; or its heads have a width that ONNX Runtime's attention does not take.
    """
    if spec.head_dim % 8:
        raise CheckpointError(
            f"{checkpoint.directory} has heads of {spec.head_dim} dimensions; ONNX Runtime's attention takes multiples "
            "of 8; give another model"
        )
    check_tensors(checkpoint)
    end_tokens(checkpoint.directory, checkpoint.config)


def check_tensors(checkpoint: Checkpoint) -> None:
    """Refuse a model whose tensors are not those that transformers' modules take.

    Raises:
        CheckpointError: it lacks tensors, has others or of other shapes, or has a head of its own beside a tied one.
    """
    taken = {name: tuple(tensor.shape) for name, tensor in empty_model(checkpoint).state_dict().items()}
    given = {
        name: tensor.shape for name, tensor in checkpoint.tensors.items() if not name.endswith("rotary_emb.inv_freq")
    }
    table, head = f"{EMBEDDING}.weight", f"{HEAD}.weight"
    if checkpoint.matrices.tied:
        taken.pop(head, None)
        if head in given:
            _check_tied_head(checkpoint, table, head)
            del given[head]
    for what, names in (
        ("which a model of its family and config.json does not use", given.keys() - taken.keys()),
        ("which a model of its family and config.json needs and it lacks", taken.keys() - given.keys()),
    ):
        if names:
            raise CheckpointError(
                f"{checkpoint.directory}: {len(names)} tensors {what}, like {', '.join(sorted(names)[:3])}; correct "
                "config.json or give a plain checkpoint of the family"
            )
    for name, shape in taken.items():
        if given[name] != shape:
            raise CheckpointError(
                f"{checkpoint.directory}: {name} has the shape {list(given[name])}, config.json says {list(shape)}; "
                "correct config.json or fetch the model again"
            )
        if len(shape) < 2:  # matrices are read before the first step; reading refuses what is not finite
            checkpoint.tensor(name)


def _check_tied_head(checkpoint: Checkpoint, table: str, head: str) -> None:
    """Refuse a head of other values than the table it is said to be tied to: transformers would use the head's own."""
    if not torch.equal(checkpoint.tensor(table), checkpoint.tensor(head)):
        raise CheckpointError(
            f"{checkpoint.directory}: tie_word_embeddings is true and {head} has other values than {table}; "
            "set it to false in config.json, or remove the tensor"
        )
