"""Locks: one holder at a time, free when it is gone, and of the directory that is there now."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from coatrt.errors import ConfigError
from coatrt.system.exclusive import exclusive
from coatrt.system.files import atomic_directory
from coatrt.system.locks import LOCK
from support.kills import fork

pytestmark = pytest.mark.fast


def _try(directory: Path) -> None:
    with exclusive(directory):
        pass


def test_one_process_at_a_time_holds_a_directory_and_nothing_stays(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with exclusive(path):
        with pytest.raises(ConfigError, match="d is in use by another training or search; wait until it ends"):
            _try(path)
        assert fork(lambda: _try(path)) == 70
        (path / "file").touch()
    _try(path)
    assert [entry.name for entry in path.iterdir()] == ["file"]
    _try(tmp_path / "empty" / "new")
    assert not (tmp_path / "empty" / "new").exists()


def test_a_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    def die() -> None:
        with exclusive(tmp_path):
            os.kill(os.getpid(), 9)

    assert fork(die) == -9
    assert (tmp_path / LOCK).is_file()
    _try(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_who_replaces_a_directory_leaves_the_new_one_free(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with exclusive(path):
        with atomic_directory(path, ()) as new:
            (new / "file").touch()
        with exclusive(path):  # of the new one
            assert fork(lambda: _try(path)) == 70
    assert [entry.name for entry in path.iterdir()] == ["file"]


def test_a_file_system_without_locks_goes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refused)
    with exclusive(tmp_path / "d"), atomic_directory(tmp_path / "d") as new:
        (new / "file").touch()
    assert [entry.name for entry in tmp_path.iterdir()] == ["d"]
