"""The report of an unexpected error: traceback, versions and command line, without secrets."""

import re
import shlex
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["write_report"]

_PRIVATE = ("-p", "--prompt", "--system")  # texts for the model
_SECRET = re.compile(r"hf_\w+|(?<=://)[^/\s@]+(?=@)|(?i:(?<=token=)|(?<=secret=)|(?<=password=)|(?<=key=))[^\s&'\"]+")


def write_report(error: BaseException, arguments: Sequence[str]) -> Path | None:
    """Write a report to the cache directory, else to the temporary one, and return its path; None if both fail.

    Args:
        error: the exception.
        arguments: the command line; prompts, tokens and passwords are left out.
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

        installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    except Exception as problem:
        installed = f"not readable ({problem})"
    trace = "".join(traceback.format_exception(error))
    return _SECRET.sub("…", f"coatrt {shlex.join(shown)}\n{installed}\n\n{trace}")
