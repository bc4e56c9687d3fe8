"""Engines kept by what they were built from: the same graph, weights, builder and shapes give the same engine."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from coatrt.engines import build_worker
from coatrt.engines.builder import BuildRecord, EngineShapes, installed_builder
from coatrt.files import atomic_file, cache_directory, sha256_file, write_json

__all__ = ["EngineCache", "engine_key"]

_LIMIT = 16 << 30


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
        "worker": sha256_file(Path(build_worker.__file__)),
        "shapes": [shapes.batch, shapes.prefill, shapes.logits],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


class EngineCache:
    """Engines on disk, the least recently used going first beyond a limit.

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
        A file whose hash does not hold is removed.

        Args:
            key: see `engine_key`.
            sms: compute capabilities it has to run on.
            engine: the file to write, atomically.
        """
        wanted = set(sms)
        for side in sorted((self.root / key).glob("*.json")):
            held = side.with_suffix(".engine")
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                facts = json.loads(side.read_text(encoding="utf-8"))
                if not wanted <= set(facts["record"]["sms"]):
                    continue
                if sha256_file(held) == facts["sha256"]:
                    with atomic_file(engine) as temporary:
                        shutil.copyfile(held, temporary)
                    side.touch()
                    return BuildRecord.from_json({**facts["record"], "file": engine.name})
            side.unlink(missing_ok=True)
            held.unlink(missing_ok=True)
        return None

    def keep(self, key: str, engine: Path, record: BuildRecord) -> None:
        """Copy an engine into the cache."""
        held = self.root / key / ("-".join(f"sm{sm}" for sm in record.sms) + ".engine")
        with atomic_file(held) as temporary:
            shutil.copyfile(engine, temporary)
        write_json(held.with_suffix(".json"), {"record": record.to_json(), "sha256": sha256_file(held)})
        self._shrink()

    def _shrink(self) -> None:
        sides = sorted(self.root.glob("*/*.json"), key=lambda path: path.stat().st_mtime)
        sizes = {side: held.stat().st_size for side in sides if (held := side.with_suffix(".engine")).is_file()}
        total = sum(sizes.values())
        for side, size in sizes.items():
            if total <= self.limit_bytes:
                return
            side.unlink(missing_ok=True)
            side.with_suffix(".engine").unlink(missing_ok=True)
            total -= size
