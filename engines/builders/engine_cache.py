"""A cache of engines, keyed by graph, weights, builder and shapes."""

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
    """Return the cache key of an engine: 32 hexadecimal digits of a hash over all it depends on except its targets.

    Args:
        directory: the directory of base.onnx and weights.bin.
        builder: "tensorrt-rtx" or "tensorrt"; must be installed.
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
    """The JSON file beside a cached engine: its record and its hash."""

    record: BuildRecord
    sha256: str


class EngineCache:
    """A directory of engines; beyond a size limit the least recently used are removed.

    An entry is an engine file, named by its targets and content, and a JSON file written after it; one without the
    other is ignored. A full or read-only disk costs cache entries, but never fails a build.

    Args:
        root: directory of the cache.
        limit_bytes: limit on the total size of the engines.
    """

    def __init__(self, root: Path, limit_bytes: int = _LIMIT) -> None:
        self.root, self.limit_bytes = root, limit_bytes

    @classmethod
    def default(cls) -> "EngineCache":
        """Return the cache in the user's cache directory."""
        return cls(cache_directory() / "engines")

    def fetch(self, key: str, sms: Iterable[int], engine: Path) -> BuildRecord | None:
        """Copy a cached engine that runs on every target to `engine` and return its record; None if there is none.

        An engine for more targets matches too: TensorRT-RTX stores one form for all of them
        (docs/evidence/engines.md). An engine with a wrong hash is removed; one that cannot be read or copied stays.

        Args:
            key: see `engine_key`.
            sms: compute capabilities the engine has to run on.
            engine: the file to write, atomically.
        """
        targets = set(sms)
        sweep(self.root / key)
        for json_file in cached(self.root / key, "*.json"):
            with contextlib.suppress(OSError, CoatError):
                entry = read_as(json_file, _Entry, "cached engine", "remove it", sealed=True)
                if not targets <= set(entry["record"].sms):
                    continue
                source = json_file.with_suffix(".engine")
                if sha256_file(source) != entry["sha256"]:
                    _remove(json_file)
                    continue
                with atomic_file(engine) as temporary:
                    shutil.copyfile(source, temporary)
                with contextlib.suppress(OSError):
                    json_file.touch()
                return replace(entry["record"], file=engine.name)
        return None

    def store(self, key: str, engine: Path, record: BuildRecord) -> None:
        """Copy an engine into the cache; a full or read-only cache is left as it is, with a warning."""
        with cache_writing():
            digest = sha256_file(engine)
            copy = self.root / key / f"{'-'.join(f'sm{sm}' for sm in record.sms)}-{digest[:12]}.engine"
            with atomic_file(copy) as temporary:
                shutil.copyfile(engine, temporary)
            write_json(copy.with_suffix(".json"), _Entry(record=record, sha256=digest), sealed=True)
            self._shrink()

    def _shrink(self) -> None:
        """Remove the least recently used entries beyond the limit, and leftovers of interrupted builds."""
        entries: list[tuple[float, int, Path]] = []
        stale = time.time() - _STALE_SECONDS
        for folder in cached(self.root, "*"):
            sweep(folder)
        for path in cached(self.root, "*/*"):
            with contextlib.suppress(OSError):  # another build may have removed it
                last_use, engine = path.stat().st_mtime, path.with_suffix(".engine")
                if path.suffix == ".json" and engine.is_file():
                    entries.append((last_use, engine.stat().st_size, path))
                elif last_use < stale and (path.suffix == ".json" or not path.with_suffix(".json").is_file()):
                    path.unlink()
        total = sum(size for _, size, _ in entries)
        for _, size, json_file in sorted(entries):
            if total <= self.limit_bytes:
                return
            _remove(json_file)
            total -= size


def _remove(json_file: Path) -> None:
    for path in (json_file, json_file.with_suffix(".engine")):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
