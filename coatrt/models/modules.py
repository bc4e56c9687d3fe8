"""The transformers model of a checkpoint: without values, or with exactly the checkpoint's tensors."""

from typing import Any

import torch
from safetensors import safe_open

from coatrt.errors import CheckpointError, reason
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.transformers_config import complete_config

__all__ = ["empty_model", "load_model"]


def empty_model(checkpoint: Checkpoint) -> Any:
    """Return the transformers model of a checkpoint on the meta device: names and shapes without values.

    Raises:
        CheckpointError: transformers has no such model, or refuses its configuration.
    """
    from accelerate import init_empty_weights
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = complete_config(checkpoint.config)
    try:
        with init_empty_weights(include_buffers=False):
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    except Exception as error:  # a bad value of config.json raises many kinds
        raise CheckpointError(
            f"transformers cannot create a {checkpoint.model_type} model from {checkpoint.directory / 'config.json'} "
            f"({reason(error)}); correct it or download it again"
        ) from None


def load_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """Return the transformers model of a checkpoint in eval mode, weights in `dtype`, on the CPU.

    It uses the tensors of `Checkpoint.tensors`, as an export does, not the files that transformers would pick.

    Raises:
        CheckpointError: transformers refuses it, a tensor is missing, or a file is damaged.
    """
    kind = type(empty_model(checkpoint))
    try:
        state: dict[str, torch.Tensor] = {}
        for path in {tensor.file for tensor in checkpoint.tensors.values()}:
            with safe_open(str(path), framework="pt") as shard:
                state.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118 - no mapping
        config = complete_config(checkpoint.config)
        model, report = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except Exception as error:
        raise CheckpointError(f"{checkpoint.directory} cannot be loaded ({reason(error)}); download it again") from None
    if wrong := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
        raise CheckpointError(f"{checkpoint.directory} is incomplete (no {', '.join(wrong[:3])}); download it again")
    for parameter in model.parameters():  # weights must not stay views of their files
        parameter.data = parameter.data.clone()
    return model.eval()
