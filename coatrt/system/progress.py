"""The progress callback of long work; the caller decides how to show it (see `coatrt.cli.progress`)."""

from typing import Protocol

__all__ = ["Progress", "silent"]


class Progress(Protocol):
    """Callback that long work calls as it proceeds."""

    def __call__(self, done: int, total: int, stage: str, note: str = "", /) -> None:
        """Report how far a stage is.

        Args:
            done: finished units of the stage; the first call of a stage may start at any number.
            total: units of the stage.
            stage: its name; a new name begins a new stage.
            note: a figure to show beside it, such as the loss.
        """


def silent(done: int, total: int, stage: str, note: str = "", /) -> None:
    """Show nothing."""
