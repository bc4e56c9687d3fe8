"""transformers' modules of a checkpoint: which tensors they take, and the model with exactly those."""

from typing import Any

import torch
from safetensors import safe_open

from coatrt.errors import CheckpointError, reason
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.transformers_config import complete_config

__all__ = ["empty_model", "load_model"]


def empty_model(checkpoint: Checkpoint) -> Any:
    """Return the transformers model of a checkpoint with parameters on the meta device: names and shapes, no values.

    Raises:
        CheckpointError: transformers has no such model, or refuses its configuration.
    """
    from accelerate import init_empty_weights
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = complete_config(checkpoint.config)
    try:
        with init_empty_weights(include_buffers=False):
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    except Exception as error:  # whatever a value of config.json meets
        raise CheckpointError(
            f"transformers cannot make a {checkpoint.model_type} model of {checkpoint.directory / 'config.json'} "
            f"({reason(error)}); correct it or fetch it again"
        ) from None


def load_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """Return the transformers model of a checkpoint in eval mode, weights in `dtype`, on the CPU.

    It gets the tensors of `Checkpoint.tensors`, those that an export reads, and not what transformers would find.

    Raises:
        CheckpointError: transformers refuses it, or it lacks a tensor, or a file is damaged.
    """
    kind = type(empty_model(checkpoint))
    try:
        state: dict[str, torch.Tensor] = {}
        for path in {tensor.file for tensor in checkpoint.tensors.values()}:
            with safe_open(str(path), framework="pt") as shard:
                state.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118 - no mapping
        config = complete_config(checkpoint.config)
        model, found = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except Exception as error:
        raise CheckpointError(f"{checkpoint.directory} cannot be loaded ({reason(error)}); fetch it again") from None
    if wrong := sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}):
        raise CheckpointError(f"{checkpoint.directory} lacks {', '.join(wrong[:3])}; the checkpoint is incomplete")
    for parameter in model.parameters():  # no weight stays a view of its file
        parameter.data = parameter.data.clone()
    return model.eval()
