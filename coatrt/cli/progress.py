"""Progress on standard error: bars in a terminal, a line every half minute elsewhere."""

import sys
from contextlib import AbstractContextManager, closing, suppress
from time import monotonic
from typing import NoReturn

import click
from tqdm import tqdm

from coatrt.system.progress import Progress

__all__ = ["drawn_progress"]

_LINE_SECONDS = 30.0
_BAR_DELAY = 2.0


class _Lines:
    """One line every half minute, for logs."""

    def __init__(self, what: str) -> None:
        self._what, self._last = what, monotonic()

    def __call__(self, done: int, total: int, stage: str, note: str = "", /) -> None:
        now = monotonic()
        if now - self._last >= _LINE_SECONDS:
            self._last = now
            with suppress(OSError):  # a line that cannot be printed stops no work
                click.echo(f"{self._what}: {stage} {done}/{total}{f', {note}' if note else ''}", err=True)

    def close(self) -> None:
        """Do nothing: a line needs no end."""


class _Bars:
    """A bar for each stage, which appears after two seconds."""

    def __init__(self, what: str) -> None:
        self._what, self._stage = what, ""
        self._bar: tqdm[NoReturn] | None = None

    def __call__(self, done: int, total: int, stage: str, note: str = "", /) -> None:
        if self._bar is None or stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(
                desc=f"{self._what}: {stage}", total=total, initial=done, delay=_BAR_DELAY, dynamic_ncols=True
            )
        with suppress(OSError):
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the bar of the current stage."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def drawn_progress(what: str) -> AbstractContextManager[Progress]:
    """Return a context whose value draws progress; its lines begin with `what`, the name of the work."""
    return closing(_Bars(what) if sys.stderr is not None and sys.stderr.isatty() else _Lines(what))
