"""Sources of models: a Hugging Face directory, a hub name (downloaded), or a GGUF file.

GGUF files and quantized checkpoints are converted once.
"""

from pathlib import Path

from coatrt.errors import CheckpointError, reason
from coatrt.models.gguf_conversion import check_conversion, convert_gguf
from coatrt.models.quantized.conversion import check_quantized, convert_quantized, is_quantized

__all__ = ["check_source", "gguf_file", "locate"]

_HUB_FILES = ["*.json", "model*.safetensors", "*.model", "*.jinja", "*.txt"]


def gguf_file(path: Path) -> Path | None:
    """Return the GGUF file at a path: itself, or the only one in a directory without config.json."""
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        return files[0] if len(files) == 1 else None
    return path if path.is_file() and path.suffix == ".gguf" else None


def locate(source: str) -> Path:
    """Return the Hugging Face directory of a model, see `Checkpoint.open`.

    Raises:
        CheckpointError: it does not exist or cannot be read.
    """
    path = Path(source).expanduser()
    if (file := gguf_file(path)) is not None:
        return convert_gguf(file)
    if path.is_dir():
        if (path / "config.json").is_file():
            return _plain(path)
        raise CheckpointError(
            f"{path} has no config.json and {len(list(path.glob('*.gguf')))} GGUF files; give a Hugging Face directory "
            "or one GGUF file"
        )
    if path.exists():
        raise CheckpointError(f"not a model: {path}; give a Hugging Face directory, a GGUF file or a hub name")
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(
            f"model {source} does not exist; give a Hugging Face directory, a GGUF file or a hub name"
        )
    from huggingface_hub import snapshot_download

    try:
        directory = Path(snapshot_download(source, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:  # the base classes of all hub errors
        raise CheckpointError(
            f"model {source} is neither a local path nor a model that can be downloaded ({_why(error)}); "
            "give a Hugging Face directory, a GGUF file or a hub name"
        ) from None
    return _plain(directory)


def _why(error: Exception) -> str:
    """Return why a model of the hub cannot be had, in a few words."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the Hugging Face hub cannot be reached"
    if isinstance(error, errors.GatedRepoError):
        return "the hub asks to accept its licence first, and to log in with: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model; a private one needs: hf auth login"
    if isinstance(error, errors.HFValidationError):
        return "not a name of the hub, such as HuggingFaceTB/SmolLM2-135M"
    return reason(error)


def _plain(directory: Path) -> Path:
    """Return a directory of plain weights: itself, or the conversion of a quantized checkpoint."""
    return convert_quantized(directory) if is_quantized(directory) else directory


def check_source(source: str | Path, directory: Path) -> None:
    """Refuse a conversion, see `locate`, whose weights are not those of its source.

    Args:
        source: a path; a hub name, which is not converted here, is not checked.
        directory: what `locate` returned for it.

    Raises:
        CheckpointError: they differ.
    """
    path = Path(source).expanduser()
    if (file := gguf_file(path)) is not None:
        check_conversion(file, directory)
    elif path.is_dir() and path.resolve() != directory.resolve():
        check_quantized(path.resolve(), directory)
