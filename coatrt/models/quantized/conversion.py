"""A quantized checkpoint as a plain Hugging Face directory in the cache, its codes beside the decoded weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from coatrt.errors import CheckpointError
from coatrt.models.codes import StoredCodes, write_codes
from coatrt.models.config_file import read_raw_config
from coatrt.models.conversion import ShardWriter, companions, convert_once, copy_companions
from coatrt.models.quantized.awq import read_awq
from coatrt.models.quantized.compressed_tensors import read_compressed_tensors
from coatrt.models.quantized.gptq import read_gptq
from coatrt.models.quantized.modelopt import read_modelopt
from coatrt.models.quantized.reading import Reading, Tensors
from coatrt.models.spec import DecoderSpec
from coatrt.models.weight_files import ALL_DTYPES, FLOATS, stored_tensors, weight_files
from coatrt.system.json_data import read_as, write_json

__all__ = ["check_quantized", "convert_quantized", "is_quantized"]

_READERS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any], Tensors], Reading]] = {
    "compressed-tensors": read_compressed_tensors,
    "gptq": read_gptq,
    "awq": read_awq,
    "modelopt": read_modelopt,
}
_KEY = "quantization_config"
_MODELOPT = "hf_quant_config.json"


def is_quantized(directory: Path) -> bool:
    """Return whether a Hugging Face directory says that its weights are quantized.

    Raises:
        CheckpointError: its config.json is damaged.
    """
    return bool(read_raw_config(directory).get(_KEY)) or (directory / _MODELOPT).is_file()


def convert_quantized(directory: Path) -> Path:
    """Decode a quantized checkpoint unless it is in the cache, and return the plain Hugging Face directory.

    Raises:
        CheckpointError: its method, a key of its quantization configuration or a tensor is unknown or damaged.
    """
    directory = directory.resolve()
    files = [directory / "config.json", *companions(directory), *weight_files(directory)[0]]
    files += [directory / _MODELOPT] if (directory / _MODELOPT).is_file() else []
    return convert_once("quantized", directory, files, lambda target: _write(directory, target))


def check_quantized(source: Path, directory: Path) -> None:
    """Decode a quantized checkpoint again and refuse a conversion whose weights or codes differ.

    Raises:
        CheckpointError: they differ; or see `convert_quantized`.
    """
    _, tensors, reading = _open(source)
    converted = Tensors(directory, stored_tensors(directory))
    codes = StoredCodes.load(directory)
    for name, read in reading.matrices.items():
        matrix = read()
        expected = matrix.codes()
        is_same = torch.equal(converted.get(f"{name}.weight"), matrix.decode())
        if is_same and not isinstance(expected, str):
            parts = codes.tensors(directory, name) if codes is not None and name in codes.formats else (None, None)
            is_same = all(
                part is not None and part.dtype == other.dtype and torch.equal(part.float(), other.float())
                for part, other in zip(parts, (expected.codes, expected.scales), strict=True)
            )
        if not is_same:
            raise CheckpointError(f"{directory}: {name} differs from {source}; remove the directory")
    for name in tensors.stored.keys() - reading.used - reading.ignored:
        if not torch.equal(converted.get(name), tensors.get(name)):
            raise CheckpointError(f"{directory}: {name} differs from {source}; remove the directory")


def _open(directory: Path) -> tuple[dict[str, Any], Tensors, Reading]:
    """Return the plain configuration, the tensors, and what they hold."""
    config = read_raw_config(directory)
    quantization = config.pop(_KEY, None)
    own = directory / _MODELOPT
    if not quantization:
        quantization = read_as(own, dict[str, Any], "quantization configuration", "download it again", CheckpointError)
        quantization = {"quant_method": "modelopt", **quantization}
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{directory}: quantization_config is not an object; download the model again")
    method = str(quantization.get("quant_method", "modelopt" if own.is_file() else ""))
    if method not in _READERS:
        raise CheckpointError(
            f"{directory} is quantized by {method or 'an unnamed method'}; allowed: {', '.join(_READERS)}; give the "
            "model before quantization"
        )
    DecoderSpec.from_config(config)  # an unknown family is named before gigabytes are read
    tensors = Tensors(directory, stored_tensors(directory, ALL_DTYPES))
    reading = _READERS[method](config, quantization, tensors)
    if not reading.matrices:
        raise CheckpointError(f"{directory}: config.json says {method}, and no tensor is quantized; download it again")
    plain = tensors.stored.keys() - reading.used
    if twice := [name for name in reading.matrices if f"{name}.weight" in plain]:
        raise CheckpointError(f"{directory} holds {twice[0]} twice, quantized and plain; download the model again")
    for name, tensor in tensors.stored.items():
        if name not in reading.used | reading.ignored and tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{directory} holds {name} as {tensor.dtype}, which {reading.method} does not explain; give the model "
                "before quantization"
            )
    return config, tensors, reading


def _write(source: Path, directory: Path) -> None:
    config, tensors, reading = _open(source)
    write_json(directory / "config.json", config)
    copy_companions(source, directory)
    weights, codes = ShardWriter(directory), ShardWriter(directory, "codes")
    formats: dict[str, str] = {}
    constants: dict[str, float] = {}
    rounded: list[str] = []
    decoded: dict[str, str] = {}
    for name in tensors.stored:
        if name not in reading.used | reading.ignored:
            weights.add(name, tensors.get(name))
    for name, read in reading.matrices.items():
        matrix = read()
        matrix.check(name)
        weights.add(f"{name}.weight", matrix.decode())
        held = matrix.codes()
        if isinstance(held, str):
            decoded[name] = held
            continue
        formats[name] = held.format
        codes.add(f"{name}.codes", held.codes)
        codes.add(f"{name}.scales", held.scales)
        if held.constant:
            constants[name] = held.constant
        if held.rounded:
            rounded.append(name)
    weights.finish()
    codes.finish()
    stored = StoredCodes(reading.method, formats, constants, tuple(rounded), decoded, reading.notes)
    write_codes(directory, stored, codes)
