"""A model on disk, read tensor by tensor in bounded memory."""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from coatrt.errors import CheckpointError, reason
from coatrt.models.codes import StoredCodes
from coatrt.models.config_file import architecture, model_type, read_config
from coatrt.models.matrices import ModelMatrices, matrices_of
from coatrt.models.sources import locate
from coatrt.models.transformers_config import complete_config
from coatrt.models.weight_files import StoredTensor, stored_tensors

__all__ = ["Checkpoint"]

_SIXTEEN = {"F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class Checkpoint:
    """A causal language model on disk, opened with `Checkpoint.open`.

    Args:
        directory: config.json, safetensors and tokenizer files.
        config: the content of config.json; `DecoderSpec` says what it means.
        tensors: every tensor by name, see `stored_tensors`.
        codes: of a checkpoint that is stored quantized, the codes that coatrt holds as they are; else None. Its tensors
            are decoded.
    """

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    codes: StoredCodes | None = None

    @classmethod
    def open(cls, source: str | Path) -> "Checkpoint":
        """Open a model without loading its weights.

        Args:
            source: a Hugging Face directory with safetensors (sharded or not), plain or quantized by
                compressed-tensors, GPTQ, AWQ or ModelOpt; a GGUF file or a directory with one; or a hub name such as
                `Qwen/Qwen3-0.6B` (downloaded). Quantized models are converted once, into the cache.

        Raises:
            CheckpointError: it does not exist, is damaged, or has no safetensors.
        """
        directory = locate(str(source))
        config, tensors = read_config(directory), stored_tensors(directory)
        layers = config.get("num_hidden_layers")
        if isinstance(layers, int) and layers > len(tensors):  # transformers would allocate them all
            raise CheckpointError(
                f"{directory / 'config.json'} says {layers} layers, the files hold {len(tensors)} tensors; correct it"
            )
        return cls(directory, config, tensors, StoredCodes.load(directory))

    @property
    def model_type(self) -> str:
        """The family in config.json: llama, qwen3 and so on."""
        return model_type(self.config)

    @cached_property
    def matrices(self) -> ModelMatrices:
        """The quantizable matrices."""
        tied = bool(complete_config(self.config).tie_word_embeddings)
        return matrices_of({name: tensor.shape for name, tensor in self.tensors.items()}, tied)

    def tensor(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Return a copy of one tensor in its stored dtype; the file is closed, so no mapping stays in memory.

        Args:
            name: name of the tensor.
            rows: slice of its first dimension; None: all.

        Raises:
            CheckpointError: there is no such tensor, a value is not finite, or its file is damaged.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.directory} has no tensor {name}; the checkpoint is incomplete or of another family"
            )
        file = self.tensors[name].file
        try:
            with safe_open(str(file), framework="pt") as shard:
                view = shard.get_tensor(name) if rows is None else shard.get_slice(name)[rows]
                tensor: torch.Tensor = view.clone()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({reason(error)}); download it again") from None
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{file}: {name} has values that are not finite; download the model again")
        return tensor

    @cached_property
    def formats(self) -> Mapping[str, str]:
        """Matrix → text of the weight format that it is stored in, of a quantized checkpoint; empty for a plain one.

        A matrix that is not quantized, or that was decoded, has the format of its 16 bits; one of 32 bits has none.
        """
        if self.codes is None:
            return {}
        plain = {name: _SIXTEEN.get(self.tensors[f"{name}.weight"].dtype, "") for name in self.matrices.names}
        named = {name: self.codes.formats.get(name, plain[name]) for name in self.matrices.names}
        return {name: text for name, text in named.items() if text}

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits from the architecture and each shard's header, size and 64 samples of its bytes."""
        digest = hashlib.sha256(json.dumps(architecture(self.config), sort_keys=True).encode())
        files = {tensor.file for tensor in self.tensors.values()}
        if self.codes is not None:
            files |= {self.directory / name for name in self.codes.files.values()}
        for path in sorted(files):
            size = path.stat().st_size
            digest.update(struct.pack("<Q", size))
            with path.open("rb") as stream:
                length = struct.unpack("<Q", stream.read(8))[0]
                digest.update(stream.read(length))
                for i in range(64):
                    stream.seek(8 + length + i * max(0, size - length - 8 - 4096) // 64)
                    digest.update(stream.read(4096))
        return digest.hexdigest()[:16]
