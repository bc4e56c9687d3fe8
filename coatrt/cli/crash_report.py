"""What is kept of an error that nobody foresaw: traceback, versions and command line, without secrets."""

import re
import shlex
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["write_report"]

_PRIVATE = ("-p", "--prompt", "--system")  # what a user says to the model
_SECRET = re.compile(r"hf_\w+|(?<=://)[^/\s@]+(?=@)|(?i:(?<=token=)|(?<=secret=)|(?<=password=)|(?<=key=))[^\s&'\"]+")


def write_report(error: BaseException, arguments: Sequence[str]) -> Path | None:
    """Write a report in the cache directory, or in the temporary one, and return its path; None where neither can be.

    Args:
        error: what was raised.
        arguments: of the command line; prompts are left out, and what looks like a token or password.
    """
    with suppress(Exception):
        text = _report(error, arguments)
        for directory in (_cache, lambda: Path(tempfile.gettempdir())):
            with suppress(Exception):
                place = directory()
                place.mkdir(parents=True, exist_ok=True)
                descriptor, name = tempfile.mkstemp(".txt", "coatrt-report-", place)
                with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:  # noqa: PTH123
                    stream.write(text)
                return Path(name)
    return None


def _cache() -> Path:
    from coatrt.system.disk import cache_directory

    return cache_directory() / "reports"


def _report(error: BaseException, arguments: Sequence[str]) -> str:
    shown = list(arguments)
    for i, argument in enumerate(arguments):
        name, sign, _ = argument.partition("=")
        if sign and name in _PRIVATE:
            shown[i] = f"{name}=…"
        elif argument.startswith("-p") and argument != "-p" and not argument.startswith("--"):
            shown[i] = "-p…"
        elif i and arguments[i - 1] in _PRIVATE:
            shown[i] = "…"
    try:
        from coatrt.devices.environment import versions

        found = ", ".join(f"{name} {version}" for name, version in versions().items())
    except Exception as problem:
        found = f"not readable ({problem})"
    trace = "".join(traceback.format_exception(error))
    return _SECRET.sub("…", f"coatrt {shlex.join(shown)}\n{found}\n\n{trace}")
