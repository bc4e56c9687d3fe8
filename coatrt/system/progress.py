"""How long work says how far it is; who calls it decides what is drawn (the command line does, see `coatrt.cli`)."""

from typing import Protocol

__all__ = ["Progress", "silent"]


class Progress(Protocol):
    """What long work calls as it goes on."""

    def __call__(self, done: int, total: int, stage: str, note: str = "", /) -> None:
        """Take note of how far a stage is.

        Args:
            done: units of the stage that are done; the first call of a stage may say any number.
            total: units of the stage.
            stage: its name; another name begins another stage.
            note: a figure to show beside it, such as the loss.
        """


def silent(done: int, total: int, stage: str, note: str = "", /) -> None:
    """Show nothing."""
