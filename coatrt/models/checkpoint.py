"""A model on disk, read tensor by tensor in bounded memory."""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open

from coatrt.errors import CheckpointError
from coatrt.models.config_file import architecture, model_type, read_config, ties_head
from coatrt.models.matrices import HEAD, ModelMatrices, matrices_of
from coatrt.models.sources import locate, quiet_transformers
from coatrt.system.json_data import read_as

__all__ = ["Checkpoint", "load_model", "load_tokenizer"]


class _ShardIndex(TypedDict):
    weight_map: dict[str, str]  # tensor → file


@dataclass(frozen=True)
class Checkpoint:
    """A causal language model on disk, opened with `Checkpoint.open`.

    Args:
        directory: config.json, safetensors and tokenizer files.
        config: the content of config.json; `DecoderSpec` says what it means.
        files: tensor name → safetensors file that holds it.
        shapes: tensor name → shape.
    """

    directory: Path
    config: Mapping[str, Any]
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def open(cls, source: str | Path) -> "Checkpoint":
        """Open a model without loading it.

        Args:
            source: a Hugging Face directory with safetensors (sharded or not), a GGUF file or a directory with one
                (converted once into the cache), or a hub name such as `Qwen/Qwen3-0.6B` (downloaded).

        Raises:
            CheckpointError: nothing is there, it is damaged, or it is not safetensors.
        """
        directory = locate(str(source))
        config = read_config(directory)
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in _shards(directory):
            for name, shape in _header(path).items():
                files[name], shapes[name] = path, shape
        return cls(directory, config, files, shapes)

    @property
    def model_type(self) -> str:
        """The family, as config.json names it: llama, qwen3, and so on."""
        return model_type(self.config)

    @cached_property
    def matrices(self) -> ModelMatrices:
        """The quantizable matrices."""
        return matrices_of(self.shapes, ties_head(self.config, f"{HEAD}.weight" in self.shapes))

    def tensor(self, name: str) -> torch.Tensor:
        """Return a copy of one tensor in its stored dtype; the file is closed again, so no mapping stays in memory.

        Raises:
            CheckpointError: there is no such tensor, or its file is damaged.
        """
        if name not in self.files:
            raise CheckpointError(
                f"{self.directory} has no tensor {name}; the checkpoint is incomplete or of another family"
            )
        try:
            with safe_open(str(self.files[name]), framework="pt") as shard:
                tensor: torch.Tensor = shard.get_tensor(name).clone()
                return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.files[name]} cannot be read ({error}); fetch the file again") from None

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over the architecture, every shard's header and size, and 64 samples of its bytes."""
        digest = hashlib.sha256(json.dumps(architecture(self.config), sort_keys=True).encode())
        for path in sorted(set(self.files.values())):
            size = path.stat().st_size
            digest.update(struct.pack("<Q", size))
            with path.open("rb") as stream:
                length = struct.unpack("<Q", stream.read(8))[0]
                digest.update(stream.read(length))
                for i in range(64):
                    stream.seek(8 + length + i * max(0, size - length - 8 - 4096) // 64)
                    digest.update(stream.read(4096))
        return digest.hexdigest()[:16]


def _shards(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = read_as(index, _ShardIndex, "shard index", "download the file again", CheckpointError)
        paths = [directory / Path(name).name for name in sorted(set(shards["weight_map"].values()))]
    else:
        paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        hint = (
            "it has only pickled weights, which are never loaded" if any(directory.glob("*.bin")) else "there are none"
        )
        raise CheckpointError(f"{directory} needs *.safetensors, and {hint}; save the model with safetensors")
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing though the index names it; fetch the model again")
    return paths


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(str(path), framework="pt") as shard:
            return {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); fetch the file again") from None


def load_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """Return the transformers model of a checkpoint in eval mode, weights in `dtype`, on the CPU.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    quiet_transformers()
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=dtype, local_files_only=True).eval()
    except (ValueError, OSError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint.directory} cannot be loaded ({str(error).splitlines()[0]}); fetch it again"
        ) from None


def load_tokenizer(directory: str | Path) -> Any:
    """Return the transformers tokenizer saved in a directory.

    Raises:
        CheckpointError: there is none.
    """
    quiet_transformers()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{directory} holds no tokenizer ({str(error).splitlines()[0]}); save one beside the model"
        ) from None
