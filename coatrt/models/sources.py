"""Where a model is: a Hugging Face directory, a GGUF file that is converted once, or a hub name that is downloaded."""

import atexit
import contextlib
import hashlib
import io
import sys
import tempfile
from pathlib import Path

import torch

from coatrt.errors import CheckpointError
from coatrt.system.disk import cache_directory, cache_writing
from coatrt.system.files import atomic_directory
from coatrt.system.scratch import scratch

__all__ = ["locate", "quiet_transformers"]

_GGUF_VERSION = 2  # of what a GGUF file is converted to
_elsewhere: dict[Path, Path] = {}  # conversions that the cache could not hold, by their place there
_until_exit = contextlib.ExitStack()
atexit.register(_until_exit.close)
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def locate(source: str) -> Path:
    """Return the Hugging Face directory of a model, see `Checkpoint.open`.

    Raises:
        CheckpointError: nothing is there, or it cannot be read.
    """
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
        raise CheckpointError(f"not a model: {path}; give a Hugging Face directory, a GGUF file or a hub name")
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(
            f"model {source} does not exist; give a Hugging Face directory, a GGUF file or a hub name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:  # all of the hub's own are one of the two
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"model {source} is not a local path and cannot be downloaded ({reason}); "
            "give a Hugging Face directory, a GGUF file or a hub name"
        ) from None


def quiet_transformers() -> None:
    """Keep transformers from printing warnings and bars of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _convert_gguf(path: Path) -> Path:
    """Return a cached Hugging Face directory with the dequantized weights (float32) and tokenizer of a GGUF file."""
    stat = path.stat()
    identity = f"{_GGUF_VERSION}:{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    target = cache_directory() / "gguf" / f"{path.stem}-{key}"
    target = _elsewhere.get(target, target)
    if (target / "config.json").is_file():
        return target
    quiet_transformers()
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

    def save(place: Path) -> None:
        with atomic_directory(place) as temporary:
            plain.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)

    with cache_writing():
        save(target)
    if target.is_dir():
        return target
    directory = _until_exit.enter_context(scratch(Path(tempfile.gettempdir()), "gguf"))
    _elsewhere[target] = directory / target.name
    save(_elsewhere[target])
    return _elsewhere[target]
