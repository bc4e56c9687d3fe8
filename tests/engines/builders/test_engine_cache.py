"""A cache that cannot be written or read loses entries and no build; builds at once keep out of each other's way."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from coatrt.engines.builders import engine_cache
from coatrt.engines.builders.builder import BuildRecord, EngineShapes
from coatrt.engines.builders.engine_cache import EngineCache

RECORD = BuildRecord("e", (86,), "tensorrt-rtx", "1", 1.0, 100, EngineShapes())
DAY = 24 * 3600


def engine_of(directory: Path, content: bytes = b"engine") -> Path:
    path = directory / "built.engine"
    path.write_bytes(content)
    return path


def held(cache: EngineCache) -> list[str]:
    return sorted(path.suffix for path in cache.root.rglob("*") if path.is_file())


def full(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["shutil.copyfile", "write_json", "sha256_file"])
def test_a_full_disk_keeps_nothing_and_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    cache, built = EngineCache(tmp_path / "c"), engine_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(f"coatrt.engines.builders.engine_cache.{what}", full)
        cache.store("key", built, RECORD)
    assert cache.fetch("key", [86], tmp_path / "got") is None
    cache.store("key", built, RECORD)
    assert cache.fetch("key", [86], tmp_path / "got") is not None


def test_a_cache_that_is_a_file_fails_nothing(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("no directory")
    cache = EngineCache(tmp_path / "c")
    assert cache.fetch("key", [86], tmp_path / "got") is None
    cache.store("key", engine_of(tmp_path), RECORD)


def test_an_engine_that_cannot_be_copied_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EngineCache(tmp_path / "c")
    cache.store("key", engine_of(tmp_path), RECORD)
    with monkeypatch.context() as patch:
        patch.setattr(engine_cache.shutil, "copyfile", full)
        assert cache.fetch("key", [86], tmp_path / "got") is None
    with monkeypatch.context() as patch:
        patch.setattr(engine_cache, "sha256_file", full)
        assert cache.fetch("key", [86], tmp_path / "got") is None
    assert not (tmp_path / "got").exists()
    assert held(cache) == [".engine", ".json"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", full)  # a read-only cache
        assert cache.fetch("key", [86], tmp_path / "got") is not None
    (engine,) = cache.root.rglob("*.engine")
    engine.write_bytes(b"damage")
    assert cache.fetch("key", [86], tmp_path / "got") is None
    assert held(cache) == []


def test_two_builds_of_one_key_do_not_break_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, real = EngineCache(tmp_path / "c"), engine_cache.write_json
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = engine_of(tmp_path / "one", b"first"), engine_of(tmp_path / "two", b"second")

    def other_first(path: Path, value: object, *, sealed: bool) -> None:
        """Let the other build keep its engine between this one's engine and JSON."""
        monkeypatch.setattr(engine_cache, "write_json", real)
        assert cache.fetch("key", [86], tmp_path / "got") is None  # no entry yet, and not deleted
        cache.store("key", two, RECORD)
        real(path, value, sealed=sealed)

    monkeypatch.setattr(engine_cache, "write_json", other_first)
    cache.store("key", one, RECORD)
    assert cache.fetch("key", [86], tmp_path / "got") is not None
    assert (tmp_path / "got").read_bytes() in (b"first", b"second")
    assert held(cache) == [".engine", ".engine", ".json", ".json"]  # each whole


def test_an_altered_record_is_no_entry(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "c")
    cache.store("key", engine_of(tmp_path), RECORD)
    (side,) = cache.root.rglob("*.json")
    side.write_text(side.read_text().replace("86", "89"))
    assert cache.fetch("key", [89], tmp_path / "got") is None
    cache.store("key", engine_of(tmp_path), RECORD)
    assert cache.fetch("key", [86], tmp_path / "got") is not None


def test_halves_go_when_they_are_old(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "c")
    cache.store("key", engine_of(tmp_path), RECORD)
    for name in ("half.engine", ".part.engine.x1y2", "alone.json"):
        (cache.root / "key" / name).write_text("{}")
    os.utime(cache.root / "key" / "alone.json", (0, 0))
    cache.store("other", engine_of(tmp_path), RECORD)
    names = {path.name for path in (cache.root / "key").iterdir()}
    assert {"half.engine", ".part.engine.x1y2"} < names
    assert "alone.json" not in names
    for name in ("half.engine", ".part.engine.x1y2"):
        old = time.time() - 2 * DAY
        os.utime(cache.root / "key" / name, (old, old))
    cache.store("other", engine_of(tmp_path), RECORD)
    assert held(cache) == [".engine", ".engine", ".json", ".json"]
    assert cache.fetch("key", [86], tmp_path / "got") is not None
