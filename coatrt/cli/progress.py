"""Progress of long work: bars in a terminal, a line at least every half minute elsewhere, whatever the work does."""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Lock, Thread
from time import monotonic
from typing import NoReturn, TextIO

import click
from tqdm import tqdm

from coatrt.system.progress import Progress, silent

__all__ = ["drawn_progress", "write_line"]

_LINE_SECONDS = 28.0  # a busy machine wakes the thread late: half a minute is kept nevertheless
_BAR_DELAY = 2.0
_BEAT_SECONDS = 1.0


class _Drawing(ABC):
    """What is drawn of a piece of work: by the work's own calls, and every second by a thread beside it."""

    def __init__(self, what: str, stream: TextIO) -> None:
        self._what, self._stream = what, stream
        self._lock, self._ended = Lock(), Event()
        self._thread = Thread(target=self._run, name="progress", daemon=True)
        self._started = monotonic()

    def __call__(self, done: int, total: int, stage: str, note: str = "", /) -> None:
        with self._lock, suppress(OSError):  # what cannot be printed stops no work
            self._show(done, total, stage, note)

    @abstractmethod
    def _show(self, done: int, total: int, stage: str, note: str) -> None:
        """Draw what the work says."""

    @abstractmethod
    def _refresh(self) -> None:
        """Draw that time goes on."""

    @abstractmethod
    def _end(self) -> None:
        """Leave the stream as it is to be afterwards."""

    def _beat(self) -> None:
        with self._lock, suppress(OSError, ValueError):  # ValueError: the stream is closed
            if not self._ended.is_set():
                self._refresh()

    def _run(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            self._beat()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Draw no more."""
        with self._lock, suppress(OSError):
            self._ended.set()
            self._end()
        self._thread.join()


class _Lines(_Drawing):
    """A line every half minute, for logs, with the seconds since the work began."""

    def __init__(self, what: str, stream: TextIO) -> None:
        super().__init__(what, stream)
        self._last, self._state = self._started, "starting"

    def _show(self, done: int, total: int, stage: str, note: str) -> None:
        count = f" {done}/{total}" if total > 1 else ""
        self._state = f"{stage}{count}{f', {note}' if note else ''}"
        self._refresh()

    def _refresh(self) -> None:
        now = monotonic()
        if now - self._last >= _LINE_SECONDS:
            self._last = now
            click.echo(f"{self._what}: {self._state} ({now - self._started:.0f} s)", file=self._stream)

    def _end(self) -> None:
        """Do nothing: a line needs no end."""


class _Bars(_Drawing):
    """A bar for each stage, which appears after two seconds; its clock goes on while nothing is reported."""

    def __init__(self, what: str, stream: TextIO) -> None:
        super().__init__(what, stream)
        self._stage = ""
        self._bar: tqdm[NoReturn] | None = None

    def _show(self, done: int, total: int, stage: str, note: str) -> None:
        if self._bar is None or stage != self._stage:
            self._end()
            self._stage = stage
            self._bar = tqdm(
                desc=f"{self._what}: {stage}",
                total=total,
                initial=done,
                miniters=0,
                delay=_BAR_DELAY,
                dynamic_ncols=True,
                bar_format=None if total > 1 else "{desc} [{elapsed}]",
                file=self._stream,
            )
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)

    def _refresh(self) -> None:
        if self._bar is not None:
            self._bar.update(0)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _is_wide(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that a bar fits into: those of containers may say they have no columns."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):  # it has no file descriptor to be asked by
        return True


@contextmanager
def drawn_progress(what: str, stream: TextIO | None = None) -> Iterator[Progress]:
    """Return what draws the progress of a piece of work.

    Args:
        what: the work's name, which begins every line and bar.
        stream: where it is drawn; None: standard error.
    """
    stream = sys.stderr if stream is None else stream
    if stream is None:  # a process without standard error
        yield silent
        return
    drawing = (_Bars if _is_wide(stream) else _Lines)(what, stream)
    drawing.start()
    try:
        yield drawing
    finally:
        drawing.close()


def write_line(line: str, stream: TextIO | None = None) -> None:
    """Print a line, above a bar if one is drawn.

    Args:
        line: what to print.
        stream: where; None: standard error.
    """
    stream = sys.stderr if stream is None else stream
    if stream is not None:
        tqdm.write(line, file=stream)
        stream.flush()
