"""Messages quote what inputs hold, and are one line all the same."""

import pytest

from coatrt.errors import CoatError, ConfigError, one_line

pytestmark = pytest.mark.fast


def test_a_message_is_one_line_whatever_it_quotes() -> None:
    error = ConfigError("a\nb\r\tc \x1b[31m é😀 \ud83d\x00 /a  b")
    assert str(error) == f"{error}" == "a b  c \\x1b[31m é😀 \\ud83d\\x00 /a  b"
    assert str(CoatError()) == ""
    long = one_line("x" * 10**6 + "end")
    assert len(long) < 2000 and long.endswith("end")
