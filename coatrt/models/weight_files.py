"""The safetensors files of a model and the tensors in their headers, one list for training and export."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from safetensors import SafetensorError, safe_open

from coatrt.errors import CheckpointError, reason
from coatrt.system.json_data import parse_json, read_as

__all__ = ["ALL_DTYPES", "FLOATS", "StoredTensor", "stored_tensors", "weight_files"]

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes; the limit of safetensors
FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of the tensors of a plain model."""
ALL_DTYPES = (*FLOATS, "F8_E4M3", "I64", "I32", "I16", "I8", "U8")
"""Dtypes of the tensors of a quantized model too."""


class _ShardIndex(TypedDict):
    weight_map: dict[str, str]  # tensor → file


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its header describes it.

    Args:
        file: the safetensors file.
        shape: its shape.
        dtype: its dtype in safetensors, such as "BF16".
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


def weight_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the weight files of a model directory, chosen like transformers, and its index (tensor → file) if used.

    `model.safetensors` if it exists, else the shards in `model.safetensors.index.json`. Other files are not read.

    Raises:
        CheckpointError: there is neither, or a shard of the index is missing or outside the directory.
    """
    if (directory / _WHOLE).is_file():
        return [directory / _WHOLE], None
    if not (directory / _INDEX).is_file():
        others = sorted(path.name for path in directory.iterdir() if path.suffix in (".safetensors", ".bin", ".pth"))
        if (directory / _WHOLE).is_symlink():
            raise CheckpointError(f"{directory / _WHOLE} is a link to a missing file; download the model again")
        hint = f"it has {', '.join(others[:3])}" if others else "has neither"
        raise CheckpointError(
            f"{directory} needs {_WHOLE} or {_INDEX}, and {hint}; pickled weights are never loaded: "
            "save the model again with save_pretrained"
        )
    index = read_as(directory / _INDEX, _ShardIndex, "shard index", "download the file again", CheckpointError)
    names = sorted(set(index["weight_map"].values()))
    for name in names:
        if not name or Path(name).name != name:
            raise CheckpointError(
                f"{directory / _INDEX} names {name!r}, which is outside the directory; do not use this model"
            )
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name} is in the index but missing; download the model again")
    return [directory / name for name in names], index["weight_map"]


def stored_tensors(directory: Path, dtypes: tuple[str, ...] = FLOATS) -> dict[str, StoredTensor]:
    """Return name → tensor of a model directory.

    Args:
        directory: the directory.
        dtypes: allowed dtypes.

    Raises:
        CheckpointError: see `weight_files`; a file is damaged, headers and index differ, or a dtype is not allowed.
    """
    files, index = weight_files(directory)
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in _header(path).items():
            if name in tensors:
                raise CheckpointError(
                    f"{path} and {tensors[name].file.name} both contain {name}; download the model again"
                )
            if tensor.dtype not in dtypes:
                raise CheckpointError(
                    f"{name} in {path} is {tensor.dtype}; allowed: {', '.join(dtypes)}; give the model before "
                    "quantization"
                )
            tensors[name] = tensor
    if index is not None:
        wrong = sorted({*tensors} ^ {*index} or {name for name in index if tensors[name].file.name != index[name]})
        if wrong:
            raise CheckpointError(
                f"{directory / _INDEX} and the shards differ in {len(wrong)} tensors, like {wrong[0]}; "
                "download the model again"
            )
    return tensors


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        with path.open("rb") as stream:  # safetensors does not report missing permissions
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(min(length, _MAX_HEADER))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; give a readable model") from None
    try:
        with safe_open(str(path), framework="np") as shard:
            tensors = {}
            for name in shard.keys():  # noqa: SIM118 - no mapping
                view = shard.get_slice(name)
                tensors[name] = StoredTensor(path, tuple(view.get_shape()), view.get_dtype())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({reason(error)}); download it again") from None
    parse_json(header, f"the header of {path}", "download it again", CheckpointError)  # refuses a repeated tensor
    return tensors
