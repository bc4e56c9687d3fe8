"""The output directory of a training: what may be there, and what is discarded."""

import shutil
from pathlib import Path

from coatrt.adapter.adapter import Adapter
from coatrt.errors import ConfigError
from coatrt.system.locks import LOCK
from coatrt.training.resume_state import check_state

__all__ = ["check_output", "claim_output", "read_finished"]


def read_finished(output: Path, identity: str) -> Adapter:
    """Return the finished adapter of a directory; refuse one of another run."""
    adapter = Adapter.from_pretrained(output)
    if adapter.description.metrics.get("run") != identity:
        raise ConfigError(
            f"{output} holds a finished adapter of other options, another model or other data; give another directory, "
            "or --overwrite to replace it"
        )
    return adapter


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a directory that a training may not be written to, before anything else is done.

    Raises:
        ConfigError: it holds a finished adapter, an unfinished training or other files, which the options do not allow.
    """
    state = output / "training"
    if not output.is_dir():
        return
    is_finished = (output / "adapter.json").is_file()
    if is_finished and not overwrite and not resume:
        raise ConfigError(f"{output} holds a finished adapter; give another directory, or --overwrite to replace it")
    others = [path for path in output.iterdir() if path.name != LOCK]
    if others and not (is_finished or state.is_dir()):
        raise ConfigError(f"{output} holds other files; give another directory")
    if state.is_dir() and not resume and not overwrite:
        raise ConfigError(
            f"{output} holds an unfinished training; give --resume to continue it, or --overwrite to start over"
        )


def claim_output(output: Path, identity: str, resume: bool, overwrite: bool) -> None:
    """Refuse a directory with other content, and discard an unfinished training unless it is resumed."""
    check_output(output, resume=resume, overwrite=overwrite)
    state = output / "training"
    if overwrite and not resume:
        shutil.rmtree(state, ignore_errors=True)
    check_state(state, identity)
