"""How a command ends on a signal: its child processes are stopped, unfinished files are removed."""

import signal
import sys
from typing import NoReturn

from coatrt.system.processes import end_children

__all__ = ["end_on_signals"]

_ENDING = (signal.SIGTERM, signal.SIGINT)


def end_on_signals() -> None:
    """Make SIGTERM and Ctrl-C end this process with exit code 143 and 130, silently."""
    for number in _ENDING:
        signal.signal(number, _end)


def _end(number: int, _: object) -> NoReturn:
    for each in _ENDING:  # a second signal must not interrupt the removal
        signal.signal(each, signal.SIG_IGN)
    end_children()
    sys.exit(128 + number)
