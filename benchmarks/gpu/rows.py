"""Rows of results: printed and appended at once, skipped if they exist already."""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["CRASHED", "Rows", "TimeOver", "arguments", "run", "summary"]

CRASHED = 70
"""Exit status of a section whose CUDA context is lost; the driver starts it again and it skips the row at fault."""


class TimeOver(Exception):
    """The section's time is used up."""


class Rows:
    """A file of JSON lines, one per measurement.

    A measurement that kills the process leaves its key in a second file, so that the next try skips it.

    Args:
        path: file to append to.
        deadline: wall-clock time (`time.time()`) after which no measurement starts.
        dry: whether shapes are tiny and the CPU provider stands in for CUDA.
    """

    def __init__(self, path: Path, deadline: float, dry: bool) -> None:
        self._path, self._deadline, self.dry = path, deadline, dry
        self._started = path.with_suffix(".started")
        self._keys = {row["key"] for row in self._read(path)}
        for key in self._started.read_text().splitlines() if self._started.exists() else ():
            if key not in self._keys:
                self._write({"key": key, "error": "the process ended in this measurement"})

    @staticmethod
    def _read(path: Path) -> Iterable[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _write(self, row: dict[str, Any]) -> None:
        line = json.dumps(row)
        with self._path.open("a") as file:
            file.write(line + "\n")
        self._keys.add(row["key"])
        print(line, flush=True)

    def add(self, key: str, **values: Any) -> None:
        """Write one row now; a row of the same key stays as it is."""
        if key not in self._keys:
            self._write({"key": key, **values})

    def has(self, *keys: str) -> bool:
        """Return whether rows of all these keys exist."""
        return all(key in self._keys for key in keys)

    def check_time(self) -> None:
        """Raise TimeOver where no time is left."""
        if time.time() > self._deadline:
            raise TimeOver

    def measure(self, key: str, work: Callable[[], dict[str, Any]]) -> None:
        """Run `work` and write what it returns, or its error, under `key`.

        Raises:
            TimeOver: no time is left.
        """
        if key in self._keys:
            return
        self.check_time()
        with self._started.open("a") as file:
            file.write(key + "\n")
        began = time.time()
        try:
            values = work()
        except TimeOver:
            raise
        except Exception as error:
            traceback.print_exc(limit=4)
            self._write({"key": key, "error": f"{type(error).__name__}: {error}"[:600]})
            if not self.dry and not _context_lives():
                os._exit(CRASHED)
            return
        self._write({"key": key, **values, "took_s": round(time.time() - began, 2)})


def _context_lives() -> bool:
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def summary(values: Iterable[float], digits: int = 3) -> dict[str, float]:
    """Return median, p10, p90 and the count of some samples."""
    ordered = sorted(values)
    count = len(ordered)
    at = {"median": 0.5, "p10": 0.1, "p90": 0.9}
    found = {name: round(ordered[min(count - 1, int(share * count))], digits) for name, share in at.items()}
    return {**found, "samples": count}


def arguments(what: str, **extra: Any) -> tuple[Rows, argparse.Namespace]:
    """Parse a section's command line and open its rows.

    Args:
        what: the section's description.
        extra: option name → default value of further options.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--out", type=Path, required=True, help="directory of the rows")
    parser.add_argument("--seconds", type=float, default=1e9, help="no measurement starts later than this")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    for name, default in extra.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    name = Path(sys.argv[0]).stem
    return Rows(given.out / f"{name}.jsonl", time.time() + given.seconds, given.dry_run), given


def run(section: Callable[[], None]) -> None:
    """Run a section and end quietly when its time is over."""
    try:
        section()
    except TimeOver:
        print("time is over", flush=True)
