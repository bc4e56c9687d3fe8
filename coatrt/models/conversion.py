"""A model converted once into a Hugging Face directory in the cache, with the hashes of its files."""

import atexit
import contextlib
import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from coatrt.errors import CheckpointError, CoatError
from coatrt.system.disk import cache_directory, cache_writing, cached
from coatrt.system.files import atomic_directory, sha256_file
from coatrt.system.json_data import read_as, write_json
from coatrt.system.scratch import scratch

__all__ = ["ShardWriter", "companions", "convert_once", "copy_companions"]

_VERSION = 5  # of the conversions' results
_SEAL = "sha256.json"  # name of each file → its hash
_SHARD = 2 << 30  # bytes
_MAX_STEM = 40  # characters of a name, at most four bytes each; a file name has at most 255 bytes
_COMPANIONS = ("*.json", "*.model", "*.jinja", "*.txt", "additional_chat_templates/*.jinja")
_OTHERS = (
    "config.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "coatrt_codes.json",
    _SEAL,
)
_temporary_copies: dict[Path, Path] = {}  # path in the cache → conversion, if the cache could not be written
_until_exit = contextlib.ExitStack()
atexit.register(_until_exit.close)


def convert_once(kind: str, source: Path, files: list[Path], write: Callable[[Path], None]) -> Path:
    """Convert a model unless it is in the cache, and return the directory.

    Args:
        kind: folder of the cache, and of temporary copies where the cache cannot be written.
        source: the model, an absolute path.
        files: its files; a change of size or time of one converts the model again.
        write: writes the files of the conversion into an empty directory.
    """
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    identity = f"{_VERSION}:{source}:{stats}"
    name = f"{source.stem[:_MAX_STEM]}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    target = cache_directory() / kind / name
    target = _temporary_copies.get(target, target)
    if _is_complete(target):
        return target
    with cache_writing():
        _convert(write, target)
    if cached(target, _SEAL):
        return target
    directory = _until_exit.enter_context(scratch(Path(tempfile.gettempdir()), kind))
    _temporary_copies[target] = directory / target.name
    _convert(write, _temporary_copies[target])
    return _temporary_copies[target]


def _convert(write: Callable[[Path], None], target: Path) -> None:
    with atomic_directory(target) as temporary:
        write(temporary)
        files = {
            file.relative_to(temporary).as_posix(): file for file in sorted(temporary.rglob("*")) if file.is_file()
        }
        write_json(temporary / _SEAL, {name: sha256_file(file) for name, file in files.items()})


def _is_complete(directory: Path) -> bool:
    """Return whether a conversion exists and every file has its hash."""
    try:
        hashes = read_as(directory / _SEAL, dict[str, str], "hashes", "convert it again")
        files = (file for file in directory.rglob("*") if file.is_file())
        names = {file.relative_to(directory).as_posix() for file in files} - {_SEAL}
        return names == set(hashes) and all(sha256_file(directory / name) == hashes[name] for name in names)
    except (CoatError, OSError):
        return False


def companions(directory: Path) -> list[Path]:
    """Return the files beside a model's weights and config.json: of its tokenizer, templates, generation settings."""
    paths = [path for pattern in _COMPANIONS for path in sorted(directory.glob(pattern))]
    return [
        path
        for path in paths
        if path.is_file() and path.name not in _OTHERS and not path.name.endswith(".safetensors.index.json")
    ]


def copy_companions(source: Path, directory: Path) -> None:
    """Copy what `companions` lists to another directory.

    Raises:
        CheckpointError: one cannot be read.
    """
    for path in companions(source):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}; give a readable model") from None
        copy = directory / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(content)


class ShardWriter:
    """Writes tensors as safetensors files of bounded size; one of them at a time is in memory.

    Args:
        directory: where to write.
        stem: start of the names of the files.
    """

    def __init__(self, directory: Path, stem: str = "model") -> None:
        self._directory, self._stem = directory, stem
        self._shard: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self.weights: dict[str, str] = {}
        """Tensor → file, of the files written so far."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor; the file is written once it is full."""
        if self._bytes + tensor.nbytes > _SHARD:
            self._flush()
        self._shard[name] = tensor.contiguous()
        self._bytes += tensor.nbytes

    def finish(self) -> None:
        """Write the last file, and the index that transformers reads."""
        self._flush()
        index = f"{self._stem}.safetensors.index.json"
        write_json(self._directory / index, {"metadata": {}, "weight_map": self.weights})

    def _flush(self) -> None:
        if self._shard:
            name = f"{self._stem}-{len(set(self.weights.values())) + 1:05d}.safetensors"
            save_file(self._shard, self._directory / name, metadata={"format": "pt"})
            self.weights.update(dict.fromkeys(self._shard, name))
            self._shard.clear()
        self._bytes = 0
