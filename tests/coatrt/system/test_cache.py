"""A cache that cannot be written, or looked at, whatever the reason: it costs time, one line says so, nothing fails."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from coatrt.engines.builders.builder import BuildRecord, EngineShapes
from coatrt.engines.builders.engine_cache import EngineCache
from coatrt.errors import DiskError
from coatrt.export.preflight import preflight
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.input_moments import Calibration
from coatrt.system.disk import cache_writing, cached, is_cached, writing
from coatrt.system.files import write_text
from coatrt.system.notices import warn_once

NAME = "model.layers.0.mlp.up_proj"
CODES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMLINK, errno.ENOENT)


def _loop(here: Path) -> Path:
    (here / "loop").symlink_to(here / "loop")
    return here / "loop" / "x"


def _file(here: Path) -> Path:
    (here / "file").write_text("")
    return here / "file" / "x"


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "below proc": (lambda _: Path("/proc/x"), "No such file or directory"),
    "proc": (lambda _: Path("/proc"), "No such file or directory"),
    "deep below proc": (lambda _: Path("/proc/no/such/place"), "No such file or directory"),
    "below a file": (_file, "Not a directory"),
    "a file": (lambda here: _file(here).parent, "Not a directory"),
    "a name too long": (lambda here: here / ("a" * 300), "File name too long"),
    "a path too long": (lambda here: here / ("a/" * 3000), "File name too long"),
    "a loop of links": (_loop, "Too many levels of symbolic links"),
}


def _use(model: Path) -> torch.Tensor:
    """Use every part of the cache that needs no builder, and return codes."""
    checkpoint = Checkpoint.open(model)
    preflight(checkpoint)
    cache, engine = EngineCache.default(), model / "config.json"
    cache.store("key", engine, BuildRecord("e", (86,), "tensorrt-rtx", "1", 1.0, 1, EngineShapes()))
    cache.fetch("key", [86], model.parent / "got")
    codes = CodeStore(checkpoint, "weighted", Calibration(torch.arange(32)[None])).get(NAME, "int4-g32").codes
    return codes.clone()


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    checkpoint = Checkpoint.open(tiny_llama)
    return CodeStore(checkpoint, "weighted", Calibration(torch.arange(32)[None])).get(NAME, "int4-g32").codes


@pytest.mark.parametrize("kind", PLACES)
def test_a_place_that_cannot_be_made(
    kind: str,
    tiny_llama: Path,
    expected: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, reason = PLACES[kind]
    place = make(tmp_path)
    warn_once.cache_clear()
    monkeypatch.setenv("COATRT_CACHE", str(place))
    assert torch.equal(_use(tiny_llama), expected)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"cannot be written ({reason}); later runs repeat this work")
    with pytest.raises(DiskError, match=r"cannot be written: [\w ]+; check the path"):  # an output does not do without
        write_text(place / "out", "")


@pytest.mark.parametrize("code", CODES, ids=lambda code: errno.errorcode[code])
def test_any_reason_of_the_system(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: object, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path / "cache"))
    warn_once.cache_clear()
    with cache_writing():
        write_text(tmp_path / "cache" / "codes" / "x", "")
    with cache_writing():
        raise OSError(code, os.strerror(code))  # as fsync says it, without a name
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot be written ({os.strerror(code)})" in line
    with pytest.raises(DiskError, match=f"out cannot be written: {os.strerror(code)}; "):
        write_text(tmp_path / "out", "")


def test_a_failing_disk_is_named_where_nothing_else_is() -> None:
    with pytest.raises(DiskError, match=r"^out cannot be written: Input/output error; check the path"), writing("out"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_directory_in_the_place_of_a_file(
    tiny_llama: Path, expected: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path))
    _use(tiny_llama)
    for path in [*tmp_path.rglob("*.safetensors")]:
        path.unlink()
        path.mkdir()
    assert torch.equal(_use(tiny_llama), expected)


def test_what_cannot_be_looked_at_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "a").write_text("")
    assert is_cached(tmp_path / "a") and cached(tmp_path, "*") == [tmp_path / "a"]
    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    assert not is_cached(tmp_path / "a") and cached(tmp_path, "*") == []
