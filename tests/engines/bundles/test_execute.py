"""Fleets of bundles: what is shared, what is skipped, what runs at once, and the build kit."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coatrt.adapter.adapter import Adapter
from coatrt.bundle import Bundle
from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import device_profile
from coatrt.engines.builders import builder as builder_module
from coatrt.engines.builders.builder import BuildRecord, EngineShapes
from coatrt.engines.builders.builder_slots import BuilderSlots, builder_bytes
from coatrt.engines.builders.engine_cache import EngineCache, engine_key
from coatrt.engines.bundles import execute as execute_module
from coatrt.engines.bundles import seal as seal_module
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.targets import Target
from coatrt.errors import BuildError, ConfigError, FormatError
from coatrt.system.files import sha256_file
from support.bundles import build_targets

SMALL = BundleOptions(context=64, shapes=EngineShapes(prefill=16))


@pytest.fixture(scope="module")
def adapter(tiny_adapter: Path) -> Adapter:
    return Adapter.from_pretrained(tiny_adapter)


class FakeBuilder:
    """Stands for the builder: an engine is the graph's hash and the targets; remembers how many ran at once."""

    def __init__(self, together: int = 0, refuse: str = "") -> None:
        """Each build lasts until `together` of them have run at once, and a moment longer, for more to join them."""
        self.calls: list[tuple[int, ...]] = []
        self.most, self._now, self._changed = 0, 0, threading.Condition()
        self.together, self.refuse = together, refuse

    def __call__(self, graph: Path, engine: Path, profile: Any, *, also: Any = (), shapes: Any = None) -> BuildRecord:
        sms = tuple(sorted({profile.sm, *(other.sm for other in also)}))
        if profile.builder == "tensorrt":
            raise BuildError("tensorrt is not installed")
        with self._changed:
            self.calls.append(sms)
            self._now += 1
            self.most = max(self.most, self._now)
            self._changed.notify_all()
            if self.together:
                self._changed.wait_for(lambda: self.most >= self.together, timeout=60)
                self._changed.wait_for(lambda: self._now > self.together, timeout=0.2)
            self._now -= 1
        if self.refuse and self.refuse in (graph.parent / "configuration.json").read_text():
            raise BuildError("no such kernel")
        engine.write_text(f"{sha256_file(graph)} {sms}")
        return BuildRecord(engine.name, sms, profile.builder, "1.0", 1.0, engine.stat().st_size, shapes)


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> FakeBuilder:
    made = FakeBuilder()
    use(made, monkeypatch)
    return made


def use(made: FakeBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (execute_module, seal_module):
        monkeypatch.setattr(module, "build_engine", made)
    for module in ("bundles.execute", "bundles.fingerprint", "builders.engine_cache"):
        monkeypatch.setattr(f"coatrt.engines.{module}.installed_builder", lambda _: "1.0")


def targets(adapter: Adapter, place: Path, **texts: str) -> list[Target]:
    return [
        Target(device_profile(name.replace("_", "-")), adapter.description.space.uniform(text), place / name)
        for name, text in texts.items()
    ]


def test_one_graph_per_configuration_and_one_engine_for_its_gpus(
    adapter: Adapter, builder: FakeBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[QuantConfig] = []
    real = execute_module.export_config
    monkeypatch.setattr(execute_module, "export_config", lambda *a, **k: (exported.append(a[2]), real(*a, **k))[1])
    wanted = targets(adapter, tmp_path, rtx_3060="int8", rtx_4090="int8", rtx_5090="nvfp4", h100="int8", cpu="int8")
    told: list[str] = []
    made = build_targets(adapter, adapter.checkpoint(), wanted, SMALL, tell=told.append)
    assert [row.target for row in made] == wanted
    assert sorted(config.hash for config in exported) == sorted({target.config.hash for target in wanted})
    assert sorted(builder.calls) == [(86, 89), (120,)]
    names = [[engine["file"] for engine in row.bundle.manifest["engines"]] for row in made]
    assert names == [["sm86-sm89.engine"], ["sm86-sm89.engine"], ["sm120.engine"], [], []]
    for row in made:
        row.bundle.check_all()
        assert row.bundle.config == row.target.config
        assert row.state == "built"
    for name in ("base.onnx", "weights.bin", "hypernet.onnx", "lora.safetensors"):
        assert made[0].bundle.path(name).read_bytes() == made[3].bundle.path(name).read_bytes()
    assert made[0].bundle.path("lora.safetensors").read_bytes() != made[2].bundle.path("lora.safetensors").read_bytes()
    assert not (tmp_path / "rtx_3060" / "build.json").exists()
    assert json.loads((tmp_path / "h100" / "build.json").read_text())["sm"] == 90
    assert any("h100: no engine built here: tensorrt is not installed" in line for line in told)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(target.output.name for target in wanted)


def test_what_is_current_is_left_and_what_changed_is_made_again(
    adapter: Adapter, builder: FakeBuilder, tmp_path: Path
) -> None:
    wanted, cache = targets(adapter, tmp_path / "b", rtx_3060="int8", t4="nf3-g32"), EngineCache(tmp_path / "cache")
    made = build_targets(adapter, adapter.checkpoint(), wanted, SMALL, cache=cache)
    assert [row.state for row in made] == ["built", "built"]
    before = [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "b").rglob("*"))]
    made = build_targets(adapter, adapter.checkpoint(), wanted, SMALL, cache=cache)
    assert [row.state for row in made] == ["current", "current"]
    assert before == [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "b").rglob("*"))]
    assert len(builder.calls) == 2
    with pytest.raises(ConfigError, match="--overwrite"):  # other options: another bundle
        build_targets(adapter, adapter.checkpoint(), wanted, BundleOptions(context=32), cache=cache)
    (tmp_path / "b" / "t4" / "weights.bin").unlink()
    made = build_targets(adapter, adapter.checkpoint(), wanted, SMALL, cache=cache, overwrite=True)
    assert [row.state for row in made] == ["current", "cached"]
    assert len(builder.calls) == 2
    moved = targets(adapter, tmp_path / "c", rtx_3060="int8", rtx_3090="int8", rtx_4090="int8")
    made = build_targets(adapter, adapter.checkpoint(), moved, SMALL, cache=cache)
    assert builder.calls[2:] == [(86, 89)]  # SM89 is new; the engine of both is kept
    alone = targets(adapter, tmp_path / "d", l4="int8")
    (row,) = build_targets(adapter, adapter.checkpoint(), alone, SMALL, cache=cache)
    assert (row.state, row.bundle.manifest["engines"][0]["sms"]) == ("cached", [86, 89])
    row.bundle.check_all()
    assert len(builder.calls) == 3


def test_a_damaged_engine_in_the_cache_is_built_again(adapter: Adapter, builder: FakeBuilder, tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache")
    one, two = (targets(adapter, tmp_path / name, rtx_3060="int8") for name in "ab")
    build_targets(adapter, adapter.checkpoint(), one, SMALL, cache=cache)
    (held,) = cache.root.rglob("*.engine")
    held.write_bytes(b"x" + held.read_bytes()[1:])
    (row,) = build_targets(adapter, adapter.checkpoint(), two, SMALL, cache=cache)
    assert (row.state, len(builder.calls)) == ("built", 2)


def test_the_cache_forgets_the_least_recently_used(tmp_path: Path) -> None:
    cache, record = (
        EngineCache(tmp_path / "c", limit_bytes=250),
        BuildRecord("e", (86,), "tensorrt-rtx", "1", 1, 100, EngineShapes()),
    )
    (tmp_path / "e").write_bytes(bytes(100))
    for key, age in (("one", 20), ("two", 10)):
        cache.store(key, tmp_path / "e", record)
        for path in (cache.root / key).iterdir():
            os.utime(path, (time.time() - age, time.time() - age))
    assert cache.fetch("one", [86], tmp_path / "got") is not None  # now two is the older one
    assert cache.fetch("one", [89], tmp_path / "got") is None
    cache.store("three", tmp_path / "e", record)
    found = [cache.fetch(key, [86], tmp_path / "got") is not None for key in ("one", "two", "three")]
    assert found == [True, False, True]


def test_a_key_follows_graph_weights_builder_and_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = "1"
    monkeypatch.setattr("coatrt.engines.builders.engine_cache.installed_builder", lambda _: version)
    for name in ("base.onnx", "weights.bin"):
        (tmp_path / name).write_bytes(b"a")
    keys = [engine_key(tmp_path, "tensorrt-rtx", EngineShapes())]
    assert engine_key(tmp_path, "tensorrt-rtx", EngineShapes()) == keys[0]
    keys.append(engine_key(tmp_path, "tensorrt-rtx", EngineShapes(batch=2)))
    keys.append(engine_key(tmp_path, "tensorrt", EngineShapes()))
    version = "2"
    keys.append(engine_key(tmp_path, "tensorrt-rtx", EngineShapes()))
    for name in ("base.onnx", "weights.bin"):
        (tmp_path / name).write_bytes(b"b")
        keys.append(engine_key(tmp_path, "tensorrt-rtx", EngineShapes()))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(("jobs", "memory", "most"), [(2, 1 << 40, 2), (1, 1 << 40, 1), (8, 1, 1)])
def test_builders_run_side_by_side_within_their_room(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, memory: int, most: int
) -> None:
    made = FakeBuilder(together=most)
    use(made, monkeypatch)
    wanted = targets(adapter, tmp_path, rtx_3060="int8", rtx_4090="fp8", t4="nf3-g32")
    build_targets(adapter, adapter.checkpoint(), wanted, SMALL, slots=BuilderSlots(jobs, memory))
    assert (len(made.calls), made.most) == (3, most)


def test_rooms_have_sane_numbers() -> None:
    assert builder_bytes(93 << 20) > 931 << 20  # the peak measured for 93 MB of weights
    with pytest.raises(ConfigError, match="must be at least 1, got 0 and None"):
        BuilderSlots(0)


def test_one_refusal_does_not_stop_the_others(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(FakeBuilder(refuse="fp8"), monkeypatch)
    wanted = targets(adapter, tmp_path, rtx_3060="int8", rtx_4090="fp8", t4="nf3-g32")
    with pytest.raises(BuildError, match=r"1 of 3 bundles failed; the others are finished\. The first: no such kernel"):
        build_targets(adapter, adapter.checkpoint(), wanted, SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rtx_3060", "t4"]


def test_a_disk_that_is_full_at_one_place_does_not_stop_the_others(
    adapter: Adapter, builder: FakeBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = seal_module.seal

    def full(directory: Path, facts: Any) -> None:
        if facts["device"]["id"] == "rtx-4090":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(directory, facts)

    monkeypatch.setattr(seal_module, "seal", full)
    wanted = targets(adapter, tmp_path, rtx_4090="int8", rtx_3060="int8", t4="nf3-g32")  # the first two share an engine
    with pytest.raises(
        BuildError, match=r"1 of 3 bundles failed; the others are finished\. The first: .*No space left .*disk space"
    ):
        build_targets(adapter, adapter.checkpoint(), wanted, SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rtx_3060", "t4"]


@pytest.mark.parametrize("stopped", [FormatError("no such number"), KeyboardInterrupt()])
def test_graphs_that_cannot_be_written_do_not_stop_bundles_that_can_be_finished(
    adapter: Adapter, builder: FakeBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: BaseException
) -> None:
    real = execute_module.export_config

    def refuse(*arguments: Any, **options: Any) -> Any:
        if arguments[2].counts.keys() == {"fp8"}:
            raise stopped
        return real(*arguments, **options)

    monkeypatch.setattr(execute_module, "export_config", refuse)
    wanted = targets(adapter, tmp_path, rtx_3060="int8", rtx_4090="fp8", t4="nf3-g32")
    with pytest.raises((BuildError, KeyboardInterrupt)):
        build_targets(adapter, adapter.checkpoint(), wanted, SMALL)
    finished = sorted(path.name for path in tmp_path.iterdir())
    if isinstance(stopped, FormatError):
        assert finished == ["rtx_3060", "t4"]
    else:  # what was being built may have ended in time
        assert finished in ([], ["rtx_3060"])
    for name in finished:
        Bundle.open(tmp_path / name).check_all()


def test_a_cache_on_a_full_disk_fails_no_build(
    adapter: Adapter, builder: FakeBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("no directory can be made here")
    wanted = targets(adapter, tmp_path / "b", rtx_3060="int8")
    (row,) = build_targets(adapter, adapter.checkpoint(), wanted, SMALL, cache=EngineCache(tmp_path / "cache"))
    assert row.state == "built"
    row.bundle.check_all()


def test_a_foreign_directory_and_a_context_beyond_the_model_are_refused_first(adapter: Adapter, tmp_path: Path) -> None:
    app = tmp_path / "webapp"
    app.mkdir()
    (app / "manifest.json").write_text('{"name": "an app"}')
    wanted = [Target(device_profile("cpu"), adapter.description.space.uniform("int8"), app)]
    with pytest.raises(ConfigError, match="holds other files"):
        build_targets(adapter, adapter.checkpoint(), wanted, SMALL, overwrite=True)
    assert [path.name for path in app.iterdir()] == ["manifest.json"]
    wanted = [Target(device_profile("cpu"), adapter.description.space.uniform("int8"), tmp_path / "new" / "b")]
    with pytest.raises(ConfigError, match="context must be at most 8192, the positions of the model, got 8193"):
        build_targets(adapter, adapter.checkpoint(), wanted, BundleOptions(context=8193))
    assert not (tmp_path / "new").exists()


def test_an_engine_is_not_built_on_another_gpu(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder_module, "installed_builder", lambda _: "10.14")
    monkeypatch.setattr(builder_module, "probe", lambda: [device_profile("rtx-4090")])
    monkeypatch.setattr(builder_module, "_run_worker", lambda *_: pytest.fail("an engine was built"))
    told: list[str] = []
    wanted = targets(adapter, tmp_path, h100="int8")
    (row,) = build_targets(adapter, adapter.checkpoint(), wanted, SMALL, tell=told.append)
    assert row.bundle.manifest["engines"] == []
    assert json.loads((tmp_path / "h100" / "build.json").read_text())["sm"] == 90
    assert (
        "h100: no engine built here: regular TensorRT needs a GPU with SM90, this machine's GPUs have SM89" in told[0]
    )


def test_a_place_is_given_once(adapter: Adapter, tmp_path: Path) -> None:
    (target,) = targets(adapter, tmp_path, cpu="int8")
    with pytest.raises(ConfigError, match="2 bundles have only 1 output directories"):
        build_targets(adapter, adapter.checkpoint(), [target, target], SMALL)


@pytest.mark.rtx
def test_the_build_kit_builds_without_coatrt(adapter: Adapter, tmp_path: Path) -> None:
    """TensorRT-RTX has the same interface as the regular one and stands in for it."""
    pytest.importorskip("tensorrt_rtx")
    wanted = targets(adapter, tmp_path, jetson_agx_orin="int8")
    options = BundleOptions(context=64, shapes=EngineShapes(prefill=16))
    (row,) = build_targets(adapter, adapter.checkpoint(), wanted, options)
    assert row.bundle.manifest["engines"] == []
    moved = Path(shutil.copytree(row.target.output, tmp_path / "on the device"))
    stand_in = tmp_path / "modules"
    stand_in.mkdir()
    (stand_in / "tensorrt.py").write_text("from tensorrt_rtx import *\nfrom tensorrt_rtx import __version__\n")
    command = [sys.executable, "build_engine.py"]
    environment = {"PYTHONPATH": str(stand_in), "PATH": "/nothing"}
    done = subprocess.run(command, cwd=moved, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bundle = Bundle.open(moved)
    (engine,) = bundle.manifest["engines"]
    assert (engine["file"], engine["sms"], engine["shapes"]["prefill"]) == ("sm87.engine", [87], 16)
    assert engine["bytes"] == bundle.path("sm87.engine").stat().st_size
    bundle.check_all()
    data = bytearray((moved / "weights.bin").read_bytes())
    data[0] ^= 1
    (moved / "weights.bin").write_bytes(data)
    done = subprocess.run(command, cwd=moved, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "weights.bin does not match its hash in manifest.json" in done.stderr


def test_a_line_that_cannot_be_printed_stops_no_bundle(adapter: Adapter, builder: FakeBuilder, tmp_path: Path) -> None:
    def refuse(_: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    wanted = targets(adapter, tmp_path, rtx_3060="int8", rtx_4090="int8", h100="int8")
    assert len(build_targets(adapter, adapter.checkpoint(), wanted, SMALL, tell=refuse)) == 3


def test_no_bundle_lies_inside_another(adapter: Adapter, builder: FakeBuilder, tmp_path: Path) -> None:
    outer, inner = targets(adapter, tmp_path, rtx_3060="int8", rtx_4090="int8")
    with pytest.raises(ConfigError, match="lies inside the bundle"):
        build_targets(adapter, adapter.checkpoint(), [outer, replace(inner, output=outer.output / "in" / "it")], SMALL)
    assert not list(tmp_path.iterdir())
    (tmp_path / "manifest.json").write_text('{"name": "an app", "files": {}}')  # another program's refuses nothing
    (row,) = build_targets(adapter, adapter.checkpoint(), [outer], SMALL)
    assert row.state == "built"
    with pytest.raises(ConfigError, match="lies inside the bundle"):  # of an earlier build
        build_targets(adapter, adapter.checkpoint(), [replace(inner, output=outer.output / "in" / "it")], SMALL)
