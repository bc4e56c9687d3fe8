"""Bundles for many devices at once: shared work done once, builders side by side, finished work not done again."""

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from coatrt.adapter.adapter import Adapter
from coatrt.bundle import Bundle, seal
from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import DeviceProfile
from coatrt.engines.builders.builder import BuildRecord, build_engine, check_formats, installed_builder
from coatrt.engines.builders.builder_slots import BuildRoom, builder_bytes
from coatrt.engines.builders.engine_cache import EngineCache, engine_key
from coatrt.engines.builders.kit import KIT_COMMAND, write_kit
from coatrt.engines.bundles.contents import export_config, export_shared
from coatrt.engines.bundles.destination import check_output
from coatrt.engines.bundles.fingerprint import is_current, recipe_hash
from coatrt.engines.bundles.options import BundleOptions
from coatrt.errors import BuildError, CoatError, ConfigError
from coatrt.export.decoder import decoder_io
from coatrt.models.checkpoint import Checkpoint
from coatrt.planning.planner import Plan
from coatrt.quantization.code_cache import CodeStore
from coatrt.system.files import atomic_directory, write_json
from coatrt.system.progress import Progress, silent

__all__ = ["Made", "Target", "build_fleet"]

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """A bundle to make.

    Args:
        device: what it is for.
        config: its configuration.
        output: its directory.
        plan: why this configuration; kept as plan.json.
        also: further devices that the same engine must serve.
    """

    device: DeviceProfile
    config: QuantConfig
    output: Path
    plan: Plan | None = None
    also: tuple[DeviceProfile, ...] = ()

    @property
    def profiles(self) -> tuple[DeviceProfile, ...]:
        """Every device its engine must serve."""
        return (self.device, *self.also)


@dataclass(frozen=True)
class Made:
    """A bundle that is there.

    Args:
        target: what was asked for.
        bundle: the bundle, opened.
        state: "built"; "cached" where its engine came from the cache; "current" where nothing was to do.
        seconds: from the start of the whole call until it was complete.
    """

    target: Target
    bundle: Bundle
    state: Literal["built", "cached", "current"]
    seconds: float


@dataclass
class _Job:
    """One configuration on its way: its files, and the targets they are for."""

    targets: list[Target]
    directory: Path
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> QuantConfig:
        return self.targets[0].config

    @property
    def sms(self) -> dict[int, DeviceProfile]:
        """Targets of the one engine that all RTX devices of the configuration share."""
        profiles = [profile for target in self.targets for profile in target.profiles]
        return {profile.sm: profile for profile in profiles if profile.builder == "tensorrt-rtx"}


def build_fleet(
    adapter: Adapter,
    checkpoint: Checkpoint,
    targets: Sequence[Target],
    options: BundleOptions | None = None,
    *,
    codes: CodeStore | None = None,
    cache: EngineCache | None = None,
    room: BuildRoom | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
    tell: Tell | None = None,
) -> list[Made]:
    """Make a bundle per target; nothing is visible at a target's place before it is complete.

    Each matrix is encoded once per format, each distinct configuration becomes one set of graphs, and one engine serves
    all its TensorRT-RTX devices. Graphs are written here, one configuration after another, while builders run beside.
    A bundle that was made from the same adapter, configuration, options and versions is left as it is. A device that
    builds for itself (regular TensorRT) gets a build kit in place of an engine, unless this machine is that device.

    Args:
        adapter: the trained adapter.
        checkpoint: its model.
        targets: what to make, every place once.
        options: see `BundleOptions`.
        codes: cache of encoded matrices.
        cache: engines of earlier builds; None builds all.
        room: how many builders run at once.
        overwrite: replace bundles that are there and are not current.
        progress: see `coatrt.system.progress`.
        tell: called with a line for the user as things finish.

    Returns:
        One entry per target, in order.

    Raises:
        FormatError: a device cannot run a format; nothing was made.
        BuildError: a builder is not installed or refuses a graph; the other bundles are made nevertheless.
        ConfigError: a configuration does not fit, or a place is in use; nothing was made.
    """
    options, room, started = options or BundleOptions(), room or BuildRoom(), time.monotonic()
    say = tell or (lambda _: None)
    made: dict[Path, Made] = {}
    recipes = {t.output: recipe_hash(adapter.hash, t.config, t.device, options, t.also, t.plan) for t in targets}
    if len(recipes) != len(targets):
        raise ConfigError(f"{len(targets)} bundles are asked for at {len(recipes)} places; give each its own directory")
    for target in targets:
        adapter.encoder.format_ids(target.config)  # refuses what the adapter cannot serve
        for profile in target.profiles:
            check_formats(target.config, profile, options.activations)
        if adapter.hash and is_current(target.output, recipes[target.output]):
            made[target.output] = Made(target, Bundle.open(target.output), "current", 0.0)
            continue
        check_output(target.output, overwrite)
        if options.engine and target.device.builder == "tensorrt-rtx":
            installed_builder(target.device.builder)
    waiting = [target for target in targets if target.output not in made]
    if not waiting:
        return [made[target.output] for target in targets]

    for form in options.forms():
        decoder_io(checkpoint, form)  # refuses more positions than the model has

    first = waiting[0].output.parent
    first.mkdir(parents=True, exist_ok=True)
    failures: list[CoatError] = []
    codes = codes or adapter.codes(checkpoint, progress)
    with tempfile.TemporaryDirectory(prefix=".coatrt-", dir=first) as scratch, ThreadPoolExecutor(room.jobs) as pool:
        work = Path(scratch)
        shared = work / "shared"
        shared.mkdir()
        jobs: dict[str, _Job] = {}
        for target in waiting:
            job = jobs.setdefault(target.config.hash, _Job([], work / target.config.hash))
            job.targets.append(target)
        running: dict[Future[tuple[BuildRecord, bool] | None], _Job] = {}

        def finish(pending: bool) -> None:
            """Seal the bundles whose engine is there; with `pending`, wait for all."""
            while running:
                done, _ = wait(running, timeout=None if pending else 0, return_when=FIRST_COMPLETED)
                if not done:
                    return
                for future in done:
                    job = running.pop(future)
                    try:
                        built = future.result()
                        for target in job.targets:
                            _seal(target, job, shared, shared_facts, recipes[target.output], built, options, say)
                            state: Literal["built", "cached"] = "cached" if built and built[1] else "built"
                            after = time.monotonic() - started
                            made[target.output] = Made(target, Bundle.open(target.output), state, after)
                            if len(targets) > 1:
                                say(f"{target.device.id}: {state} after {after:.0f} s")
                    except CoatError as error:
                        failures.append(error)
                    except OSError as error:
                        failures.append(
                            BuildError(f"a bundle cannot be written ({error}); make room, then build again")
                        )
                    shutil.rmtree(job.directory, ignore_errors=True)

        shared_facts: dict[str, Any] = {}
        for number, job in enumerate(jobs.values()):
            job.directory.mkdir()
            if not shared_facts:
                shared_facts.update(export_shared(adapter, checkpoint, shared))
            total = len(jobs) * len(adapter.model.names)

            def step(done: int, of: int, _: str, __: str = "", *, number: int = number, total: int = total) -> None:
                progress(number * of + done, total, "matrices")

            job.facts = export_config(
                adapter, checkpoint, job.config, shared, job.directory, options, codes=codes, progress=step
            )
            running[pool.submit(_engine, job, options, cache, room)] = job
            finish(pending=False)
        finish(pending=True)
    if failures:
        if len(targets) == 1:
            raise failures[0]
        lost = len(waiting) - sum(target.output in made for target in waiting)
        raise BuildError(f"{lost} of {len(targets)} bundles failed, the others are made: {failures[0]}")
    return [made[target.output] for target in targets]


def _engine(
    job: _Job, options: BundleOptions, cache: EngineCache | None, room: BuildRoom
) -> tuple[BuildRecord, bool] | None:
    """Return the record of the engine that all RTX devices of a job share, and whether it came from the cache."""
    if not job.sms or not options.engine:
        return None
    profile, *others = (job.sms[sm] for sm in sorted(job.sms))
    engine = job.directory / ("-".join(f"sm{sm}" for sm in sorted(job.sms)) + ".engine")
    key = engine_key(job.directory, profile.builder, options.shapes) if cache is not None else ""
    if cache is not None and (found := cache.fetch(key, job.sms, engine)) is not None:
        return found, True
    with room.take(builder_bytes((job.directory / "weights.bin").stat().st_size)):
        record = build_engine(job.directory / "base.onnx", engine, profile, also=others, shapes=options.shapes)
    if cache is not None:
        cache.keep(key, engine, record)
    return record, False


def _seal(
    target: Target,
    job: _Job,
    shared: Path,
    shared_facts: Mapping[str, Any],
    recipe: str,
    built: tuple[BuildRecord, bool] | None,
    options: BundleOptions,
    say: Tell,
) -> None:
    """Put a bundle together and make it visible."""
    device = target.device
    with atomic_directory(target.output) as temporary:
        for source in (shared, job.directory):
            shutil.copytree(source, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.engine"))
        engines: list[Mapping[str, Any]] = []
        if device.builder == "tensorrt-rtx" and built is not None:
            shutil.copyfile(job.directory / built[0].file, temporary / built[0].file)
            engines.append(built[0].to_json())
        elif device.builder == "tensorrt" and options.engine:
            engines += _local_engine(temporary, target, options, say)
        if target.plan is not None:
            write_json(temporary / "plan.json", target.plan.to_json())
        facts = {**shared_facts, **job.facts, "device": device.to_json(), "engines": engines, "recipe": recipe}
        seal(temporary, facts)


def _local_engine(directory: Path, target: Target, options: BundleOptions, say: Tell) -> list[Mapping[str, Any]]:
    """Build with regular TensorRT where it is installed and a GPU has the target's SM, else leave a build kit."""
    device = target.device
    try:
        record = build_engine(
            directory / "base.onnx",
            directory / f"sm{device.sm}.engine",
            device,
            also=target.also,
            shapes=options.shapes,
        )
        return [record.to_json()]
    except BuildError as error:
        write_kit(directory, device, options.shapes)
        say(f"{device.id}: no engine here ({error}); on the device, in the bundle: {KIT_COMMAND}")
        return []
