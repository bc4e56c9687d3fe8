"""Engines kept by what they were built from: the same graph, weights, builder and shapes give the same engine."""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from coatrt.engines.builders import kit_script, worker
from coatrt.engines.builders.builder import BuildRecord, EngineShapes, installed_builder
from coatrt.errors import CoatError
from coatrt.system.disk import cache_directory, cache_writing, cached
from coatrt.system.files import atomic_file, sha256_file
from coatrt.system.json_data import read_as, write_json
from coatrt.system.scratch import sweep

__all__ = ["EngineCache", "engine_key"]

_LIMIT = 16 << 30
_STALE_SECONDS = 24 * 3600


def engine_key(directory: Path, builder: str, shapes: EngineShapes) -> str:
    """Return 32 digits for what an engine depends on, its targets aside.

    Args:
        directory: holds base.onnx and weights.bin.
        builder: "tensorrt-rtx" or "tensorrt", installed here.
        shapes: ranges of the dynamic dimensions.
    """
    content = {
        "graph": sha256_file(directory / "base.onnx"),
        "weights": sha256_file(directory / "weights.bin"),
        "builder": f"{builder} {installed_builder(builder)}",
        "worker": [sha256_file(Path(file)) for file in (worker.__file__, kit_script.__file__)],
        "shapes": [shapes.batch, shapes.prefill, shapes.logits],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


class _Entry(TypedDict):
    """The JSON beside a cached engine: what was built, and the hash of the engine."""

    record: BuildRecord
    sha256: str


class EngineCache:
    """Engines on disk, the least recently used going first beyond a limit.

    An entry is an engine, named by its targets and content, and then its JSON; without both it is no entry. A disk that
    is full or read-only loses entries, never a build.

    Args:
        root: directory of the cache.
        limit_bytes: most bytes of engines kept.
    """

    def __init__(self, root: Path, limit_bytes: int = _LIMIT) -> None:
        self.root, self.limit_bytes = root, limit_bytes

    @classmethod
    def default(cls) -> "EngineCache":
        """Return the cache in the user's cache directory."""
        return cls(cache_directory() / "engines")

    def fetch(self, key: str, sms: Iterable[int], engine: Path) -> BuildRecord | None:
        """Copy an engine that serves every target to `engine` and return its record; None where there is none.

        An engine for more targets serves as well: TensorRT-RTX stores one form for all of them (docs/engines.md).
        A file whose hash does not hold is removed; one that cannot be read or copied is left.

        Args:
            key: see `engine_key`.
            sms: compute capabilities it has to run on.
            engine: the file to write, atomically.
        """
        wanted = set(sms)
        sweep(self.root / key)
        for side in cached(self.root / key, "*.json"):
            with contextlib.suppress(OSError, CoatError):
                entry = read_as(side, _Entry, "cached engine", "remove it", sealed=True)
                if not wanted <= set(entry["record"].sms):
                    continue
                held = side.with_suffix(".engine")
                if sha256_file(held) != entry["sha256"]:
                    _remove(side)
                    continue
                with atomic_file(engine) as temporary:
                    shutil.copyfile(held, temporary)
                with contextlib.suppress(OSError):
                    side.touch()
                return replace(entry["record"], file=engine.name)
        return None

    def keep(self, key: str, engine: Path, record: BuildRecord) -> None:
        """Copy an engine into the cache, where there is room and leave to."""
        with cache_writing():
            digest = sha256_file(engine)
            held = self.root / key / f"{'-'.join(f'sm{sm}' for sm in record.sms)}-{digest[:12]}.engine"
            with atomic_file(held) as temporary:
                shutil.copyfile(engine, temporary)
            write_json(held.with_suffix(".json"), _Entry(record=record, sha256=digest), sealed=True)
            self._shrink()

    def _shrink(self) -> None:
        """Remove the least recently used entries beyond the limit, and what builds that were stopped have left."""
        entries: list[tuple[float, int, Path]] = []
        stale = time.time() - _STALE_SECONDS
        for folder in cached(self.root, "*"):
            sweep(folder)
        for path in cached(self.root, "*/*"):
            with contextlib.suppress(OSError):  # another build may have removed it
                used, held = path.stat().st_mtime, path.with_suffix(".engine")
                if path.suffix == ".json" and held.is_file():
                    entries.append((used, held.stat().st_size, path))
                elif used < stale and (path.suffix == ".json" or not path.with_suffix(".json").is_file()):
                    path.unlink()
        total = sum(size for _, size, _ in entries)
        for _, size, side in sorted(entries):
            if total <= self.limit_bytes:
                return
            _remove(side)
            total -= size


def _remove(side: Path) -> None:
    for path in (side, side.with_suffix(".engine")):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
