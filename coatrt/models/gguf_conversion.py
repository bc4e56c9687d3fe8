"""A GGUF file as a Hugging Face directory in the cache: converted once, with the hashes of its files."""

import atexit
import contextlib
import hashlib
import io
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from coatrt.errors import CheckpointError, CoatError, reason
from coatrt.models.gguf_file import GgufModel
from coatrt.models.spec import DecoderSpec
from coatrt.models.transformers_config import quiet_transformers
from coatrt.models.weight_files import stored_tensors
from coatrt.system.disk import cache_directory, cache_writing, cached
from coatrt.system.files import atomic_directory, sha256_file
from coatrt.system.json_data import read_as, write_json
from coatrt.system.scratch import scratch

__all__ = ["check_conversion", "convert_gguf"]

_VERSION = 4  # of the conversion's result
_SEAL = "sha256.json"  # name of each file → its hash
_INDEX = "model.safetensors.index.json"
_SHARD = 2 << 30  # bytes
_MAX_STEM = 40  # characters of a name, at most four bytes each; a file name has at most 255 bytes
_temporary_copies: dict[Path, Path] = {}  # path in the cache → conversion, if the cache could not be written
_until_exit = contextlib.ExitStack()
atexit.register(_until_exit.close)


def convert_gguf(path: Path) -> Path:
    """Convert a GGUF file, unless it is in the cache, and return the Hugging Face directory.

    Raises:
        CheckpointError: see `GgufModel`; or transformers cannot read its tokenizer.
    """
    path = path.resolve()
    stat = path.stat()
    identity = f"{_VERSION}:{path}:{stat.st_size}:{stat.st_mtime_ns}"
    target = (
        cache_directory() / "gguf" / f"{path.stem[:_MAX_STEM]}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    )
    target = _temporary_copies.get(target, target)
    if _is_complete(target):
        return target
    model = GgufModel(path)
    with cache_writing():
        _convert(model, target)
    if cached(target, _SEAL):
        return target
    directory = _until_exit.enter_context(scratch(Path(tempfile.gettempdir()), "gguf"))
    _temporary_copies[target] = directory / target.name
    _convert(model, _temporary_copies[target])
    return _temporary_copies[target]


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


def _convert(model: GgufModel, target: Path) -> None:
    with atomic_directory(target) as temporary:
        write_json(temporary / "config.json", model.config)
        write_json(temporary / "generation_config.json", {"eos_token_id": model.end_tokens})
        DecoderSpec.from_config(model.config)  # first, so that its errors are not taken for the tokenizer's
        _write_tokenizer(model, temporary)
        _write_shards(model, temporary)
        write_json(temporary / _SEAL, {file.name: sha256_file(file) for file in sorted(temporary.iterdir())})


def _is_complete(directory: Path) -> bool:
    """Return whether a conversion exists and every file has its hash."""
    try:
        hashes = read_as(directory / _SEAL, dict[str, str], "hashes", "convert it again")
        names = {file.name for file in directory.iterdir()} - {_SEAL}
        return names == set(hashes) and all(sha256_file(directory / name) == hashes[name] for name in names)
    except (CoatError, OSError):
        return False


def _write_shards(model: GgufModel, directory: Path) -> None:
    """Write the tensors as shards of bounded size; one shard at a time is in memory."""
    weights: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        if shard:
            name = f"model-{len(set(weights.values())) + 1:05d}.safetensors"
            save_file(shard, directory / name, metadata={"format": "pt"})
            weights.update(dict.fromkeys(shard, name))
            shard.clear()

    for name, tensor in model.tensors():
        if size + tensor.nbytes > _SHARD:
            flush()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
    flush()
    write_json(directory / _INDEX, {"metadata": {}, "weight_map": weights})


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
