"""Prompts: given, from files and from standard input, and what is refused."""

import io
import sys
from pathlib import Path

import pytest

from coatrt.cli import prompts
from coatrt.cli.prompts import read_prompts
from coatrt.errors import ConfigError


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    """Return the bytes behind standard input, whose text layer has another encoding."""
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(data, encoding="ascii"))
    return data


def test_prompts_keep_their_order_and_their_text(tmp_path: Path, stdin: io.BytesIO) -> None:
    (tmp_path / "a").write_bytes("\ufeffzwei\r\nZeilen \n\r\n".encode())
    stdin.write("drei ä\n".encode())
    stdin.seek(0)
    assert read_prompts(["eins\n", "-"], [str(tmp_path / "a")]) == ["eins\n", "drei ä", "zwei\r\nZeilen \n"]


def test_standard_input_as_a_file(stdin: io.BytesIO) -> None:
    stdin.write(b"one")
    stdin.seek(0)
    assert read_prompts([], ["-"]) == ["one"]


def test_standard_input_where_nothing_else_is_given(stdin: io.BytesIO) -> None:
    stdin.write(b"one\ntwo\n")
    stdin.seek(0)
    assert read_prompts([], []) == ["one\ntwo"]


def test_a_wrong_prompt_is_one_line(tmp_path: Path, stdin: io.BytesIO, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latin").write_bytes(b"one\n\xe4")
    (tmp_path / "long").write_bytes(b"x" * 11)
    monkeypatch.setattr(prompts, "_MOST_BYTES", 10)
    for texts, files, said in (
        ([], [], r"^no prompt: give -p TEXT, -f FILE, or write it to standard input$"),
        (["-"], ["-"], "standard input holds one prompt: give '-' once"),
        ([], [tmp_path / "none"], r"^prompt .*none cannot be read \(No such file or directory\); give a UTF-8 file$"),
        ([], [tmp_path], r"cannot be read \(Is a directory\)"),
        ([], ["\0"], "cannot be read"),
        ([], [tmp_path / "latin"], r"prompt .*latin line 2 .*UTF-8"),
        ([], [tmp_path / "long"], "long must be at most 0 MiB; give a shorter prompt"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            read_prompts(texts, [str(path) for path in files])
        assert len(str(caught.value).splitlines()) == 1
