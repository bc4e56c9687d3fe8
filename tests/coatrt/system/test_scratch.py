"""Scratch: swept when its process is gone, never before; what was put aside comes back."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from coatrt.system.files import write_text
from coatrt.system.scratch import OLD, is_scratch, restore, scratch, sweep
from support.kills import fork

pytestmark = pytest.mark.fast


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _die(folder: Path, name: str, aside: str | None = None) -> None:
    def die() -> None:
        with scratch(folder, name) as place:
            (place / "half").write_text("x")
            if aside is not None:
                (place / OLD).mkdir()
                (folder / aside).rename(place / OLD / aside)
            os.kill(os.getpid(), 9)

    assert fork(die) == -9


def test_what_a_killed_process_leaves_is_swept_and_a_living_one_keeps_its_own(tmp_path: Path) -> None:
    (tmp_path / ".mine.coatrt-notes").mkdir()
    (tmp_path / ".file.coatrt-0123456789abcdef").write_text("a file of someone else")
    for name in ("one", "two\nlines", "ü" * 127):
        _die(tmp_path, name)
        assert sum(map(is_scratch, _names(tmp_path))) == 2  # and the one of a file; the one before is swept
    with scratch(tmp_path, "living") as place:
        assert fork(lambda: sweep(tmp_path)) == 0
        assert place.is_dir()
        assert _names(tmp_path) == sorted([".file.coatrt-0123456789abcdef", ".mine.coatrt-notes", place.name])
    write_text(tmp_path / "f", "x")
    assert _names(tmp_path) == [".file.coatrt-0123456789abcdef", ".mine.coatrt-notes", "f"]


def test_a_directory_put_aside_comes_back_unless_its_place_is_taken(tmp_path: Path) -> None:
    for name in ("gone", "taken"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("old")
        _die(tmp_path, name, aside=name)
        if name == "taken":
            (tmp_path / name).mkdir()
        restore(tmp_path / name)
    sweep(tmp_path)
    assert (tmp_path / "gone" / "file").read_text() == "old"
    assert _names(tmp_path) == ["gone", "taken"]
    assert not list((tmp_path / "taken").iterdir())


def test_scratch_found_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, calls = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            assert fork(lambda: (setattr(fcntl, "flock", lock), sweep(tmp_path))) == 0
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with scratch(tmp_path, "a") as place:
        assert _names(tmp_path) == [place.name]
        assert len(calls) == 2


def test_without_locks_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks")

    _die(tmp_path, "left")
    monkeypatch.setattr(fcntl, "flock", refused)
    with scratch(tmp_path, "a"):
        assert len(_names(tmp_path)) == 2
    assert len(_names(tmp_path)) == 1


def test_parents_are_removed_again_if_nothing_was_written(tmp_path: Path) -> None:
    new = tmp_path / "new" / "deeper"
    with pytest.raises(ZeroDivisionError), scratch(new, "a"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with scratch(tmp_path / "mine", "a"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]  # it was there before
    with scratch(new, "a") as directory:
        directory.with_name("kept").touch()
    assert [path.name for path in new.iterdir()] == ["kept"]
