"""Text of files: UTF-8, without the byte order mark that some editors put in front; what is none is named by line."""

import codecs
import re

from coatrt.errors import CoatError, ConfigError

__all__ = ["MARK", "decode"]

MARK = "\ufeff"
"""The byte order mark, dropped once at the beginning of a file; UTF-8 needs none."""

_OTHERS = (  # the longer marks first: one of UTF-32 begins as one of UTF-16
    ("UTF-32", codecs.BOM_UTF32_LE),
    ("UTF-32", codecs.BOM_UTF32_BE),
    ("UTF-16", codecs.BOM_UTF16_LE),
    ("UTF-16", codecs.BOM_UTF16_BE),
)


def decode(data: bytes, where: str, error: type[CoatError] = ConfigError) -> str:
    """Return the text of a file, its lines ended as they are there.

    Args:
        data: content of the file.
        where: names it in messages.
        error: what to raise.

    Raises:
        CoatError: it is UTF-16 or UTF-32, or a line of it is no UTF-8.
    """
    for name, mark in _OTHERS:
        if data.startswith(mark):
            raise error(f"{where} is {name} by its first bytes ({mark.hex(' ')}); save it as UTF-8")
    try:
        return data.decode("utf-8").removeprefix(MARK)
    except UnicodeDecodeError as problem:
        line = 1 + len(re.findall(rb"\r\n|\r|\n", data[: problem.start]))
        raise error(
            f"{where} line {line} is no UTF-8 text (byte {data[problem.start : problem.start + 1].hex()} at "
            f"{problem.start}: {problem.reason}); save it as UTF-8"
        ) from None
