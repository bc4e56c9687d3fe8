"""Atomic files: what is visible is whole, whatever happens."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coatrt.errors import ConfigError
from coatrt.system import files
from coatrt.system.files import atomic_directory, atomic_file, sha256_file, write_text
from coatrt.system.scratch import restore
from support.kills import kill_at_each_step

pytestmark = pytest.mark.fast


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file"
    with atomic_file(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("new, half-wr")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_error_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with atomic_directory(path) as temporary:
        (temporary / "one").write_text("1")
    with pytest.raises(RuntimeError), atomic_directory(path) as temporary:
        (temporary / "two").write_text("2")
        raise RuntimeError
    assert [entry.name for entry in path.iterdir()] == ["one"]
    with atomic_directory(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "three").write_text("3")
        (temporary / "sub" / "three").chmod(0o600)
    assert [str(entry.relative_to(path)) for entry in path.rglob("*")] == ["sub", "sub/three"]
    assert (path / "sub" / "three").stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == ["d"]


_SLOW = """
import sys, time
from coatrt.system.files import atomic_file
with atomic_file(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_kill_9_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with subprocess.Popen([sys.executable, "-c", _SLOW, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        os.kill(process.pid, signal.SIGKILL)
    assert path.read_text() == "old"


def test_hash(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "data").write_bytes(data)
    assert sha256_file(tmp_path / "data") == hashlib.sha256(data).hexdigest()


def test_what_a_directory_does_not_own_moves_into_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "d"
    (path / "notes").mkdir(parents=True)
    for name in ("old", "notes/mine", "both"):
        (path / name).write_text(name)
    with atomic_directory(path, ("old", "new")) as temporary:
        (temporary / "new").write_text("new")
        (temporary / "both").write_text("newer")
    assert {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()} == {
        "new": "new",
        "notes/mine": "notes/mine",
        "both": "newer",
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["d"]


def test_a_directory_that_cannot_be_replaced_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path / "a" / "b")
    for path, said in (
        (".", "is or contains the current directory"),
        ("..", "contains the current directory"),
        ("../../file", "is a file"),
        ("/proc", "is a mount point"),
    ):
        with pytest.raises(ConfigError, match=said), atomic_directory(path):
            raise AssertionError
    assert sorted(str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*")) == ["a", "a/b", "file"]


def test_a_swap_that_fails_leaves_the_old_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d"
    path.mkdir()
    (path / "one").write_text("1")
    rename, names = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        names.append(self.name)
        if len(names) == 2:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"), atomic_directory(path) as temporary:
        (temporary / "two").write_text("2")
    assert [str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*")] == ["d", "d/one"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_not_replaced(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with (
        pytest.raises(ConfigError, match="is a link; give its target"),
        atomic_directory(tmp_path / "link"),
    ):
        pass
    assert (tmp_path / "link").is_symlink()


def _content(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("own", [None, ("a", "b")])
def test_kill_9_at_any_step_leaves_the_old_directory_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, own: tuple[str, ...] | None
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    theirs = {"mine/deep/notes": "1", "mine/list": "2", "todo": "3"} if own else {}
    old, new = {"a": "old", **theirs}, {"a": "new", "sub/b": "new", **theirs}

    def replace() -> None:
        with atomic_directory(tmp_path / "d", own) as temporary:
            (temporary / "a").write_text("new")
            (temporary / "sub").mkdir()
            (temporary / "sub" / "b").write_text("new")

    def begin() -> None:
        for name, text in old.items():
            (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "d" / name).write_text(text)

    begin()
    seen = []
    for _ in kill_at_each_step(replace):
        if not exchange:
            restore(tmp_path / "d")
        found = _content(tmp_path / "d")
        assert found in (old, new)
        seen.append(found == new)
        replace()
        assert _content(tmp_path / "d") == new
        assert [entry.name for entry in tmp_path.iterdir()] == ["d"]
        shutil.rmtree(tmp_path / "d")
        begin()
    assert len(seen) > 20 and set(seen) == {True, False}


def test_kill_9_at_any_step_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path, seen = tmp_path / "f", []

    def replace() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("new")

    path.write_text("old")
    for _ in kill_at_each_step(replace):
        seen.append(path.read_text())
        replace()
        assert [entry.name for entry in tmp_path.iterdir()] == ["f"]
        path.write_text("old")
    assert len(seen) > 8 and set(seen) == {"old", "new"}


def test_files_of_others_stay_the_same_files_and_come_along_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "d"
    path.mkdir()
    (path / "mine").write_text("1")
    (path / "mine").chmod(0o600)
    (path / "link").symlink_to("nowhere")
    number = (path / "mine").stat().st_ino
    with atomic_directory(path, ()) as temporary:
        (temporary / "a").write_text("a")
        (path / "late").write_text("while the new one is made")
    assert (path / "mine").stat().st_ino == number

    def refused(*_: object, **__: object) -> None:
        raise OSError("no links")

    monkeypatch.setattr(os, "link", refused)
    with atomic_directory(path, ()):
        pass
    assert (path / "mine").read_text() == "1"
    assert (path / "mine").stat().st_mode & 0o777 == 0o600
    assert (path / "link").readlink() == Path("nowhere")
    assert (path / "late").is_file()


def test_devices_pipes_and_links_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null"), tmp_path):
        with pytest.raises(ConfigError, match="not a regular file: "):
            write_text(path, "x")
    assert (tmp_path / "pipe").is_fifo() and Path("/dev/null").is_char_device()
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "to" / "file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "to" / "file").read_text() == "new"
