"""Full and read-only disks: one line with the path and the remedy; a cache that cannot be written; where it is."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from coatrt.errors import BuildError, ConfigError, DiskError
from coatrt.system.disk import cache_directory, cache_writing, writing
from coatrt.system.notices import warn_once

pytestmark = pytest.mark.fast

FULL = "out cannot be written: No space left on device; free disk space, or give a path on another disk"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
        RuntimeError("[ONNXRuntimeError] : 1 : FAIL : write failed: No space left on device"),
        DiskError(".out.coatrt-x/new/a cannot be written", "No space left on device", FULL.rpartition("; ")[2]),
    ],
)
def test_each_librarys_error_is_one_line_of_the_path(error: Exception) -> None:
    with pytest.raises(ConfigError) as caught, writing("out"):
        raise error
    assert str(caught.value) == FULL


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.EROFS, "Read-only file system; give a writable path, or change its permissions"),
        (errno.EDQUOT, "Disk quota exceeded; free disk space, or give a path on another disk"),
        (errno.EFBIG, r"File too large; raise the limit on file sizes \(ulimit -f\), or give a path on another disk"),
    ],
)
def test_other_reasons(code: int, said: str) -> None:
    with pytest.raises(DiskError, match=f"^out cannot be written: {said}$"), writing("out"):
        raise OSError(code, os.strerror(code))


def test_errors_about_other_files_are_left_alone(tmp_path: Path) -> None:
    for error in (
        PermissionError(errno.EACCES, "no", "/elsewhere"),
        PermissionError(errno.EACCES, "no", str(tmp_path / "beside")),
        BrokenPipeError(errno.EPIPE, "closed"),
        FileNotFoundError(errno.ENOENT, "none", str(tmp_path / "x")),
        BuildError("the builder says: No space left on device"),
        ValueError("x"),
    ):
        with pytest.raises(type(error)) as caught, writing(tmp_path / "out"):
            raise error
        assert caught.value is error
    for named in (tmp_path / ".out.coatrt-0123456789abcdef" / "new", tmp_path.parent):
        with pytest.raises(DiskError, match="out cannot be written: Permission denied"), writing(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "no", str(named))


def test_a_cache_that_cannot_be_written_is_one_line_a_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_once.cache_clear()
    monkeypatch.setenv("COATRT_CACHE", "/cache")
    for _ in range(2):
        with cache_writing(), writing("/cache/codes"):
            raise OSError(errno.ENOSPC, "full")
    assert capsys.readouterr().err == (
        "coatrt: the cache /cache cannot be written (No space left on device); later runs repeat this work\n"
    )


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for own, shared, home, place in (
        ("/own", "/shared", "/home/me", "/own"),
        ("", "/shared", "/home/me", "/shared/coatrt"),
        ("", "", "/home/me", "/home/me/.cache/coatrt"),
        ("own", "", "/home/me", str(tmp_path / "own")),
        ("", "shared", "/home/me", str(tmp_path / "shared" / "coatrt")),
    ):
        monkeypatch.setenv("COATRT_CACHE", own)
        monkeypatch.setenv("XDG_CACHE_HOME", shared)
        monkeypatch.setenv("HOME", home)
        assert cache_directory() == Path(place)


def test_no_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setenv("COATRT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert cache_directory() == Path("/shared/coatrt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(
        DiskError, match=r"^no cache directory: no home directory; set COATRT_CACHE to a writable directory"
    ):
        cache_directory()
