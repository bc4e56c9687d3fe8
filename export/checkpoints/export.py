"""A configuration of an adapter as files of other runtimes: the model, and its LoRA beside it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from coatrt.adapter.adapter import Adapter
from coatrt.adapter.peft_format import write_emitted_peft
from coatrt.configs.config import QuantConfig
from coatrt.errors import ConfigError
from coatrt.export.checkpoints.compressed_tensors import write_compressed_tensors
from coatrt.export.checkpoints.gguf import check_gguf, write_gguf, write_gguf_lora
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import QuantizedMatrix
from coatrt.system.extras import require
from coatrt.system.files import atomic_directory, check_replaceable
from coatrt.system.progress import Progress, silent

__all__ = ["CheckpointFormat", "ExportedCheckpoint", "export_checkpoint"]

CheckpointFormat = Literal["compressed-tensors", "gguf"]

_LORA = "lora"
_GGUF, _GGUF_LORA = "model.gguf", "lora.gguf"
_SHOWN = 2


@dataclass(frozen=True)
class ExportedCheckpoint:
    """What was written.

    Args:
        model: the checkpoint: a directory, or a GGUF file.
        lora: the LoRA of the configuration: a PEFT directory, or a GGUF file.
        wide: matrix → why it takes 16 bits although its format has fewer.
    """

    model: Path
    lora: Path
    wide: dict[str, str]

    @property
    def line(self) -> str | None:
        """Which matrices take 16 bits, as one line; None: none does."""
        if not self.wide:
            return None
        parts = []
        for why in dict.fromkeys(self.wide.values()):
            names = [name for name, other in self.wide.items() if other == why]
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            parts.append(f"{', '.join(names[:_SHOWN])}{more} ({why})")
        return f"stored in 16 bits: {'; '.join(parts)}"


def export_checkpoint(
    adapter: Adapter,
    config: QuantConfig,
    output: str | Path,
    format: CheckpointFormat = "compressed-tensors",
    *,
    model: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ExportedCheckpoint:
    """Write a configuration, and the LoRA fitted to it, for vLLM and transformers, or for llama.cpp.

    The weights are those of a bundle of the configuration, in the same codes.

    Args:
        adapter: the trained adapter.
        config: the configuration.
        output: directory to write: a Hugging Face directory with the LoRA in lora/, or model.gguf and lora.gguf.
        format: "compressed-tensors" or "gguf".
        model: the adapter's model, if it has moved.
        overwrite: replace a directory that this function wrote.
        progress: called while matrices are encoded and written.

    Raises:
        ConfigError: the format is unknown, a format of the configuration is not the adapter's, or `output` has files.
        CheckpointError: the model cannot be read, or GGUF has no form for it.
    """
    if format not in get_args(CheckpointFormat):
        raise ConfigError(f"format must be one of {', '.join(get_args(CheckpointFormat))}, got {format!r}")
    output = Path(output)
    own = _check_output(output, overwrite)
    tensors = {name: value.numpy() for name, value in adapter.emit(config).items()}
    checkpoint = adapter.checkpoint(model)
    contract, source = adapter.description.contract, adapter.description.source
    if format == "gguf":
        require("a GGUF file", "gguf")
        check_gguf(checkpoint)
    matrices = _matrices(adapter.codes(checkpoint, progress), checkpoint, config, progress)
    with atomic_directory(output, own) as directory:
        if format == "gguf":
            wide = {
                name: f"GGUF has no type for {config[name]}"
                for name in write_gguf(directory / _GGUF, checkpoint, matrices)
            }
            write_gguf_lora(directory / _GGUF_LORA, checkpoint, tensors, contract)
        else:
            wide = write_compressed_tensors(directory, checkpoint, matrices)
            write_emitted_peft(directory / _LORA, tensors, contract, source, config.hash)
    names = (_GGUF, _GGUF_LORA) if format == "gguf" else ("", _LORA)
    return ExportedCheckpoint(output / names[0], output / names[1], wide)


def _check_output(output: Path, overwrite: bool) -> list[str]:
    """Return the names of an earlier checkpoint's files; other files in the directory stay."""
    check_replaceable(output)
    if not output.is_dir() or not any(output.iterdir()):
        return []
    files = {path.name for path in output.iterdir()}
    is_ours = files == {_GGUF, _GGUF_LORA} or {"config.json", _LORA, "model.safetensors.index.json"} <= files
    if not is_ours:
        raise ConfigError(f"{output} holds other files; give a new directory")
    if not overwrite:
        raise ConfigError(f"{output} holds a checkpoint; give a new directory, or --overwrite to replace it")
    return [name for name in files if name.startswith("model") or name in (_LORA, _GGUF_LORA)]


def _matrices(
    codes: CodeStore, checkpoint: Checkpoint, config: QuantConfig, progress: Progress
) -> Iterator[tuple[str, QuantizedMatrix]]:
    names: Sequence[str] = checkpoint.matrices.names
    for i, name in enumerate(names):
        yield name, codes.get(name, config[name])
        progress(i + 1, len(names), "weights")
