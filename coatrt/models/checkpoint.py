"""Models as they come: a Hugging Face directory, a hub name or a GGUF file, read tensor by tensor in bounded memory."""

import contextlib
import hashlib
import io
import json
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from coatrt.errors import CheckpointError, ConfigError
from coatrt.models.matrices import HEAD, ModelMatrices, matrices_of
from coatrt.system.files import atomic_directory, cache_directory, read_json

__all__ = ["Checkpoint", "load_model", "load_tokenizer"]

_VOLATILE_KEYS = {
    "transformers_version",
    "_name_or_path",
    "_model_name_or_path",
    "torch_dtype",
    "dtype",
    "architectures",
}
_GGUF_VERSION = 2  # of what a GGUF file is converted to
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


@dataclass(frozen=True)
class Checkpoint:
    """A causal language model on disk, opened with `Checkpoint.open`.

    Args:
        directory: config.json, safetensors and tokenizer files.
        config: the content of config.json.
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
        directory = _locate(str(source))
        config = _config(directory)
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in _shards(directory):
            for name, shape in _header(path).items():
                files[name], shapes[name] = path, shape
        return cls(directory, config, files, shapes)

    @property
    def model_type(self) -> str:
        """The family, as config.json names it: llama, qwen3, and so on."""
        return str(self.config.get("model_type", ""))

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """All tensor names."""
        return tuple(self.files)

    @cached_property
    def matrices(self) -> ModelMatrices:
        """The quantizable matrices; where config.json leaves it out, a head is tied that has no weights of its own."""
        tied = self.config.get("tie_word_embeddings", f"{HEAD}.weight" not in self.shapes)
        return matrices_of(self.shapes, bool(tied))

    def has(self, name: str) -> bool:
        """Return whether the checkpoint holds a tensor of this name."""
        return name in self.files

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
        config = {key: value for key, value in self.config.items() if key not in _VOLATILE_KEYS}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
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


def _locate(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _convert_gguf(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return _convert_gguf(found[0])
        raise CheckpointError(
            f"{path} has no config.json and {len(found)} GGUF files; give a Hugging Face directory or one GGUF file"
        )
    if path.exists():
        raise CheckpointError(f"{path} is no model; give a Hugging Face directory, a GGUF file or a hub name")
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(
            f"model {source} does not exist; give a Hugging Face directory, a GGUF file or a hub name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_FILES))
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
        ValueError,
    ) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"model {source} is no local path and the hub did not give it ({reason}); "
            "give a Hugging Face directory, a GGUF file or a hub name"
        ) from None


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = read_json(directory / "config.json", "model configuration")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(f"{directory / 'config.json'} names no model_type; give a Hugging Face model directory")
    if config.get("quantization_config"):
        raise CheckpointError(f"{directory} is quantized already; give the 16- or 32-bit model it was made from")
    return config


def _shards(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(read_json(index, "shard index")["weight_map"].values()))
        except (ConfigError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is no shard index ({error}); fetch the file again") from None
        paths = [directory / Path(name).name for name in names]
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


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _convert_gguf(path: Path) -> Path:
    """Return a cached Hugging Face directory with the dequantized weights (float32) and tokenizer of a GGUF file."""
    stat = path.stat()
    identity = f"{_GGUF_VERSION}:{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    target = cache_directory() / "gguf" / f"{path.stem}-{key}"
    if (target / "config.json").is_file():
        return target
    _quiet_transformers()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet:
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise CheckpointError(f"{path.name} needs the gguf extra ({error}); pip install 'coatrt[gguf]'") from None
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as GGUF ({str(error).splitlines()[0]}); fetch it again or give safetensors"
        ) from None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it describes the GGUF file, and save_pretrained refuses it
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.tie_weights()
    end = model.config.eos_token_id
    if isinstance(end, int):  # the file's; transformers 5.17 gives the tokenizer the start token
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    with atomic_directory(target) as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return target


def load_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """Return the transformers model of a checkpoint in eval mode, weights in `dtype`, on the CPU.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    _quiet_transformers()
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
    _quiet_transformers()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{directory} holds no tokenizer ({str(error).splitlines()[0]}); save one beside the model"
        ) from None
