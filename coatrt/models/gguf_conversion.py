"""A GGUF file as a Hugging Face directory in the cache."""

import contextlib
import io
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from coatrt.errors import CheckpointError, reason
from coatrt.models.conversion import ShardWriter, convert_once
from coatrt.models.gguf_file import GgufModel
from coatrt.models.spec import DecoderSpec
from coatrt.models.transformers_config import quiet_transformers
from coatrt.models.weight_files import stored_tensors
from coatrt.system.json_data import write_json

__all__ = ["check_conversion", "convert_gguf"]


def convert_gguf(path: Path) -> Path:
    """Convert a GGUF file, unless it is in the cache, and return the Hugging Face directory.

    Raises:
        CheckpointError: see `GgufModel`; or transformers cannot read its tokenizer.
    """
    path = path.resolve()
    return convert_once("gguf", path, [path], lambda directory: _write(GgufModel(path), directory))


def check_conversion(path: Path, directory: Path) -> None:
    """Decode a GGUF file again and refuse a conversion whose tensors differ.

    Raises:
        CheckpointError: they differ; or see `GgufModel`.
    """
    stored = stored_tensors(directory)
    for name, tensor in GgufModel(path).tensors():
        converted = None
        if name in stored:
            with safe_open(str(stored[name].file), framework="pt") as shard:
                converted = shard.get_tensor(name)
        if converted is None or not torch.equal(converted, tensor):
            raise CheckpointError(f"{directory}: {name} differs from {path}; remove the directory")


def _write(model: GgufModel, directory: Path) -> None:
    write_json(directory / "config.json", model.config)
    write_json(directory / "generation_config.json", {"eos_token_id": model.end_tokens})
    DecoderSpec.from_config(model.config)  # first, so that its errors are not taken for the tokenizer's
    _write_tokenizer(model, directory)
    shards = ShardWriter(directory)
    for name, tensor in model.tensors():
        shards.add(name, tensor)
    shards.finish()


def _write_tokenizer(model: GgufModel, directory: Path) -> None:
    quiet_transformers()
    from transformers import AutoTokenizer

    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet:
            tokenizer = AutoTokenizer.from_pretrained(
                model.path.parent, gguf_file=model.path.name, trust_remote_code=False
            )
        if (end := model.config["eos_token_id"]) is not None:  # transformers 5.17 sets the start token
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        tokenizer.save_pretrained(directory)
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(
            f"the tokenizer in {model.path} cannot be read ({reason(error)}); download it again or give safetensors"
        ) from None
