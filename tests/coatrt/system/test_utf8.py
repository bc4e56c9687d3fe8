"""Text of files: a mark in front is dropped, and what is no UTF-8 is named with file and line, in data and in JSON."""

import codecs
import json
from pathlib import Path

import pytest

from coatrt.data.documents import read_documents
from coatrt.data.jsonl import read_lines
from coatrt.errors import BundleError, ConfigError
from coatrt.system.json_data import parse_json, read_as
from coatrt.system.utf8 import decode

BOM = codecs.BOM_UTF8
ROW = b'{"prompt": "a", "completion": "b"}'


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_mark_in_front_is_dropped_once(tmp_path: Path) -> None:
    assert read_documents([put(tmp_path / "a.txt", BOM + b"so")]) == ["so"]
    assert read_documents([put(tmp_path / "a.txt", BOM + BOM + "s\ufeffo".encode())]) == ["\ufeffs\ufeffo"]
    assert [line.value for line in read_lines([put(tmp_path / "a.jsonl", BOM + ROW + b"\n" + ROW)])] == [
        json.loads(ROW)
    ] * 2
    assert read_as(put(tmp_path / "a.json", BOM + ROW), object, "thing", "") == json.loads(ROW)
    assert parse_json(BOM + b"[1]", "x", "") == [1]


def test_a_mark_elsewhere_in_json_is_named(tmp_path: Path) -> None:
    joined = put(tmp_path / "a.jsonl", ROW + b"\n" + BOM + ROW)  # cat of two files
    with pytest.raises(ConfigError, match=r"a\.jsonl line 2 begins with a byte order mark \(U\+FEFF\) .*; remove"):
        read_lines([joined])
    with pytest.raises(ConfigError, match=r"thing .*a\.json begins with a byte order mark"):
        read_as(put(tmp_path / "a.json", BOM + BOM + ROW), object, "thing", "")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_are_named(encoding: str, tmp_path: Path) -> None:
    name = encoding[:6].upper()
    text = ROW.decode() if encoding.count("-") == 1 else f"\ufeff{ROW.decode()}"
    data = text.encode(encoding)
    with pytest.raises(ConfigError, match=rf"^data .*a\.txt is {name} \(it begins with [0-9a-f ]+\); save it as UTF-8"):
        read_documents([put(tmp_path / "a.txt", data)])
    with pytest.raises(ConfigError, match=rf"^data .*a\.jsonl is {name} \(it begins"):
        read_lines([put(tmp_path / "a.jsonl", data)])
    with pytest.raises(ConfigError, match=rf"^thing .*a\.json is {name} \(it begins"):
        read_as(put(tmp_path / "a.json", data), object, "thing", "")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("bad", [b"\xe9", b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf5", b"\x80"])
def test_bytes_that_are_no_text_have_a_line(bad: bytes, end: bytes, tmp_path: Path) -> None:
    data = ROW + end + end + ROW.replace(b"a", bad) + end
    said = rf"line 3 is not UTF-8 \(byte {bad[:1].hex()} at \d+: [a-z ]+\); save it as UTF-8"
    for name, read in (("a.txt", read_documents), ("a.jsonl", read_lines)):
        with pytest.raises(ConfigError, match=rf"^data .*{name} {said}$"):
            read([put(tmp_path / name, data)])
    with pytest.raises(BundleError, match=rf"^thing .*a\.json {said}$"):
        read_as(put(tmp_path / "a.json", data), object, "thing", "", BundleError)


def test_a_nul_has_a_line(tmp_path: Path) -> None:
    for name, read in (("a.txt", read_documents), ("a.jsonl", read_lines)):
        for data in (ROW + b"\r\n" + ROW[:5] + b"\0", ROW + b"\n" + "so".encode("utf-16-le")):
            with pytest.raises(ConfigError, match=rf"{name} line 2 holds a NUL character; give UTF-8"):
                read([put(tmp_path / name, data)])
    (line,) = read_lines([put(tmp_path / "a.jsonl", b'{"prompt": "\\u0000"}')])
    assert line.value["prompt"] == "\0"  # written as an escape it is meant


def test_ends_of_lines(tmp_path: Path) -> None:
    assert read_documents([put(tmp_path / "a.txt", b"a\r\nb\rc\n\nd")]) == ["a\nb\nc\n\nd"]
    rows = b"\r\n".join([ROW, b"", b"  ", ROW]) + b"\r" + ROW + b"\n\n"
    assert [line.where.rpartition(" ")[2] for line in read_lines([put(tmp_path / "a.jsonl", rows)])] == ["1", "4", "5"]
    inside = '{"prompt": "a\u2028b\u2029c\x85d"}'.encode()
    (line,) = read_lines([put(tmp_path / "a.jsonl", inside)])  # these end a line for nobody but Unicode
    assert line.value["prompt"] == "a\u2028b\u2029c\x85d"
    assert decode(b"a\r\nb\r", "x") == "a\r\nb\r"


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 2}', '{"a": 1, "\\u0061": 1}', '[{"b": [{"a": {}, "c": 0, "a": {}}]}]', '{"a": NaN, "a": 1}'],
)
def test_a_key_given_twice_is_named(text: str, tmp_path: Path) -> None:
    said = "is not JSON" if "NaN" in text else "has the key 'a' twice in one object; remove one of them"
    with pytest.raises(ConfigError, match=rf"thing .*a\.json {said}"):
        read_as(put(tmp_path / "a.json", text.encode()), object, "thing", "")
    with pytest.raises(ConfigError, match=rf"a\.jsonl line 2 {said}"):
        read_lines([put(tmp_path / "a.jsonl", ROW + b"\n" + text.encode())])
    assert parse_json('{"a": {"a": 1}, "b": {"a": 1}}', "x", "") == {"a": {"a": 1}, "b": {"a": 1}}
