"""Text of files: UTF-8, a byte order mark in front dropped; anything else is refused with its line."""

import codecs
import re

from coatrt.errors import CoatError, ConfigError

__all__ = ["MARK", "decode"]

MARK = "\ufeff"
"""The byte order mark, dropped at the beginning of a file; UTF-8 needs none."""

_OTHER_ENCODINGS = (  # longer marks first: that of UTF-32 begins like that of UTF-16
    ("UTF-32", codecs.BOM_UTF32_LE),
    ("UTF-32", codecs.BOM_UTF32_BE),
    ("UTF-16", codecs.BOM_UTF16_LE),
    ("UTF-16", codecs.BOM_UTF16_BE),
)


def decode(data: bytes, where: str, error: type[CoatError] = ConfigError) -> str:
    """Return the text of a file, line endings unchanged.

    Args:
        data: content of the file.
        where: name of the file, for messages.
        error: class to raise.

    Raises:
        CoatError: it is UTF-16 or UTF-32, or a line is not UTF-8.
    """
    for name, mark in _OTHER_ENCODINGS:
        if data.startswith(mark):
            raise error(f"{where} is {name} (it begins with {mark.hex(' ')}); save it as UTF-8")
    try:
        return data.decode("utf-8").removeprefix(MARK)
    except UnicodeDecodeError as problem:
        line = 1 + len(re.findall(rb"\r\n|\r|\n", data[: problem.start]))
        raise error(
            f"{where} line {line} is not UTF-8 (byte {data[problem.start : problem.start + 1].hex()} at "
            f"{problem.start}: {problem.reason}); save it as UTF-8"
        ) from None
