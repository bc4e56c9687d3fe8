"""Flip a bit or a byte in every file coatrt keeps: each is refused in one line, or made again with an equal result.

python tests/campaigns/flips.py --flips 1000 -o flips.json
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
_OUTCOMES = ("refused", "remade", "harmless")


@dataclass
class Place:
    """Files of one kind, and what reads them.

    Args:
        name: of the kind.
        directory: holds nothing but these files.
        use: reads them as a command would and returns what came of it, as text that equals where the result does.
        remade: they are a cache: what is damaged is made again, and nothing is refused.
    """

    name: str
    directory: Path
    use: Callable[[], str]
    remade: bool = False
    expected: str = ""
    content: dict[Path, bytes] = field(default_factory=dict)

    def start(self) -> None:
        """Remember what is there and what comes of it."""
        self.expected = self.use()
        assert self.use() == self.expected, f"{self.name} gives another result each time"
        self.content = {path: path.read_bytes() for path in self._files()}

    def restore(self) -> None:
        """Put every file back as it was."""
        for path in self._files():
            if path not in self.content:
                path.unlink()
        for path, data in self.content.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def _files(self) -> list[Path]:
        files = (path for path in sorted(self.directory.rglob("*")) if path.is_file())
        return [path for path in files if not path.name.endswith(".lock")]

    def flip(self, path: Path, at: int, change: int) -> str:
        """Change one byte of a file, use it, put it back; return one of `_OUTCOMES`, or what is wrong."""
        from coatrt.errors import CoatError

        data = bytearray(self.content[path])
        data[at] ^= change
        path.write_bytes(data)
        try:
            if self.use() != self.expected:
                return "accepted with another result"
            return "harmless" if path.is_file() and path.read_bytes() == data else "remade"
        except CoatError as error:
            if self.remade:
                return f"a cache is refused: {error}"
            return "refused" if "\n" not in str(error) and "; " in str(error) else f"no line to act on: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            self.restore()


class _Stopped(Exception):
    pass


def _cached(directory: Path, use: Callable[[], str]) -> Callable[[], str]:
    """Return `use` with a directory as the user's cache."""

    def call() -> str:
        before = os.environ.get("COATRT_CACHE")
        os.environ["COATRT_CACHE"] = str(directory)
        try:
            return use()
        finally:
            os.environ.pop("COATRT_CACHE")
            if before is not None:
                os.environ["COATRT_CACHE"] = before

    return call


def places(scratch: Path) -> Iterator[Place]:
    """Make one of each kind of file, of tiny models."""
    from coatrt.adapter.adapter import Adapter
    from coatrt.system.json_data import dump_json
    from coatrt.system.tensors import hash_tensors
    from coatrt.training.run import train
    from support.tiny import save_tiny_llama, text_data, tiny_options

    model = save_tiny_llama(scratch / "model")
    data = text_data(model)
    formats = ("int8", "nf3-g32-dq4-bf16-256")
    small = tiny_options(steps=3, checkpoint_every=1, preset="none", compensation=False, formats=formats)
    common = scratch / "cache"

    def described(adapter: Adapter) -> str:
        facts = adapter.description
        own = dump_json([facts.own, facts.sensitivity, {**facts.metrics, "seconds": 0}])
        tokens = "" if adapter.calibration is None else adapter.calibration.hash
        return hash_tensors(adapter.lora.state_dict()) + own + tokens

    def stop(done: int, total: int, stage: str, note: str = "") -> None:
        if stage == "training" and done == 2 and any(scratch.glob("unfinished/training/state.safetensors")):
            raise _Stopped

    def trained(output: Path, **more: Any) -> Adapter:
        return train(model, data, output, small, **more)

    adapter = scratch / "adapter"
    _cached(common, lambda: described(trained(adapter)))()
    yield Place("adapter", adapter, lambda: described(Adapter.from_pretrained(adapter)))
    yield _training(scratch, common, trained, stop, described)
    yield from _json_places(scratch, adapter)
    yield from _caches(scratch, model, adapter)
    yield from _bundles(scratch, common, adapter)


def _training(scratch: Path, common: Path, trained: Any, stop: Any, described: Any) -> Place:
    place, copy = scratch / "unfinished", scratch / "resumed"

    def stopped() -> str:
        try:
            trained(place, progress=stop)
        except _Stopped:
            return ""
        raise AssertionError("training did not stop")

    _cached(common, stopped)()

    def resume() -> str:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(place, copy)
        return str(described(trained(copy, resume=True)))

    return Place("training state", place, _cached(common, resume))


def _json_places(scratch: Path, adapter: Path) -> Iterator[Place]:
    from coatrt.adapter.description import AdapterDescription
    from coatrt.planning.archive import Archive, ArchiveEntry
    from coatrt.planning.measured_latency import MeasuredLatency, Product, Rest
    from coatrt.system.json_data import dump_json, write_json

    space = AdapterDescription.load(adapter).space
    archive = scratch / "archive" / "archive.json"
    archive.parent.mkdir()
    for number, fmt in enumerate(space.formats):
        Archive.open(archive, 1000, "me").add(ArchiveEntry(space.uniform(str(fmt)), 100 + number, 1.5))
    yield Place("archive", archive.parent, lambda: repr(Archive.load(archive, "me").entries))
    timings = scratch / "timings" / "cpu.json"
    products = tuple(Product(64, 64, "int8", tokens, 1e-4 * tokens) for tokens in (1, 16))
    write_json(timings, MeasuredLatency("cpu", "ort 1", {}, products, (Rest((1,), 1, 1, 1.0),)), sealed=True)
    yield Place("device timings", timings.parent, lambda: dump_json(MeasuredLatency.load(timings)))


def _caches(scratch: Path, model: Path, adapter: Path) -> Iterator[Place]:
    from coatrt.adapter.adapter import Adapter
    from coatrt.engines.builders.builder import BuildRecord, EngineShapes
    from coatrt.engines.builders.engine_cache import EngineCache
    from coatrt.models.checkpoint import Checkpoint
    from coatrt.quantization.code_cache import CodeStore
    from coatrt.quantization.input_moments import InputMoments
    from coatrt.system.tensors import hash_tensors

    checkpoint, calibration = Checkpoint.open(model), Adapter.from_pretrained(adapter).calibration
    assert calibration is not None
    name = "model.layers.0.self_attn.q_proj"

    def codes() -> str:
        found = [CodeStore(checkpoint).get(name, fmt) for fmt in ("int8", "nf3-g32-dq4-bf16-256")]
        return " ".join(hash_tensors(one.tensors) + one.constant.hex() for one in found)

    def moments() -> str:
        read = InputMoments(checkpoint, calibration)
        return hash_tensors({name: read.get(name) for name in sorted(read.leader)})

    def engine() -> str:
        cache, built = EngineCache(scratch / "engines"), scratch / "built.engine"
        built.write_bytes(b"engine" * 1000)
        record = BuildRecord("e.engine", (86,), "tensorrt-rtx", "1", 1.0, 6000, EngineShapes())
        assert cache.fetch("key", [89], scratch / "got.engine") is None, "served for another GPU"
        found = cache.fetch("key", [86], scratch / "got.engine")
        if found is None:
            cache.store("key", built, record)
            found = cache.fetch("key", [86], scratch / "got.engine")
        assert found is not None
        return repr(found) + (scratch / "got.engine").read_bytes().hex()

    yield Place("codes", scratch / "codes", _cached(scratch / "codes", codes), remade=True)
    yield Place("moments", scratch / "moments", _cached(scratch / "moments", moments), remade=True)
    yield Place("engines", scratch / "engines", engine, remade=True)
    yield from _conversions(scratch, model)


def _conversions(scratch: Path, model: Path) -> Iterator[Place]:
    try:
        import gguf  # noqa: F401
    except ImportError:
        return
    from transformers import AutoModelForCausalLM

    from coatrt.models.checkpoint import Checkpoint
    from coatrt.system.tensors import hash_tensors
    from support.gguf_files import write_gguf

    file = scratch / "model.gguf"
    write_gguf(file, AutoModelForCausalLM.from_pretrained(model))

    def convert() -> str:
        found = Checkpoint.open(file)
        texts = [path.read_text() for path in sorted(found.directory.glob("*.json")) if path.name != "sha256.json"]
        weights = {name: found.tensor(f"{name}.weight") for name in found.matrices.names}
        return hash_tensors(weights) + "".join(texts)

    yield Place("conversions", scratch / "gguf", _cached(scratch / "gguf", convert), remade=True)


def _bundles(scratch: Path, common: Path, directory: Path) -> Iterator[Place]:
    from coatrt.adapter.adapter import Adapter
    from coatrt.bundle import Bundle
    from coatrt.devices.profiles import device_profile
    from coatrt.engines.bundles.options import BundleOptions
    from coatrt.planning import planner
    from support.bundles import make_bundle
    from support.keys import write_keys

    adapter, bundle = Adapter.from_pretrained(directory), scratch / "bundle"
    plan = planner.plan(adapter.description, device_profile("h100"), bits=5.2, context=64, prefill=16)

    def make() -> str:
        make_bundle(adapter, plan.config, "h100", bundle, BundleOptions(context=64), plan=plan)
        return ""

    _cached(common, make)()
    keys = write_keys(scratch / "keys")
    if keys is not None:
        Bundle.open(bundle).sign(keys[0])

    def check() -> str:
        opened = Bundle.open(bundle, key=None if keys is None else keys[1])
        return f"{opened.check_all()} {opened.manifest}"

    yield Place("bundle", bundle, check)


def campaign(flips: int, seed: int, scratch: Path) -> dict[str, Any]:
    """Flip in each kind of file in turn, each file as often as another; return what came of it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that what is measured again is measured to the bit
    started, rng = time.monotonic(), random.Random(seed)
    try:
        made = list(places(scratch))
        for place in made:
            place.start()
        counts = {place.name: Counter[str]() for place in made}
        wrong: list[dict[str, Any]] = []
        turns = {place.name: sorted(place.content, key=lambda _: rng.random()) for place in made}
        for number in range(flips):
            place = made[number % len(made)]
            files = turns[place.name]
            path = files[number // len(made) % len(files)]
            if not place.content[path]:
                continue
            at = rng.randrange(len(place.content[path]))
            change = 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)
            outcome = place.flip(path, at, change)
            counts[place.name][outcome if outcome in _OUTCOMES else "wrong"] += 1
            if outcome not in _OUTCOMES:
                file = path.relative_to(place.directory).as_posix()
                wrong.append({"place": place.name, "file": file, "at": at, "change": change, "outcome": outcome})
    finally:
        torch.set_num_threads(threads)
    return {
        "flips": sum(sum(count.values()) for count in counts.values()),
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "files": {place.name: len(place.content) for place in made},
        "outcomes": {name: dict(sorted(count.items())) for name, count in counts.items()},
        "wrong": wrong,
    }


def main() -> None:
    """Run from the command line; exit code 1 where something altered was accepted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = campaign(options.flips, options.seed, Path(scratch))
    text = json.dumps(result, indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n")
    print(text)
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
