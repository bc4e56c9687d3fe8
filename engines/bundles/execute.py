"""A prepared build, done: shared files once, graphs one configuration after another, builders side by side."""

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from coatrt.adapter.adapter import Adapter
from coatrt.engines.builders.builder import BuildRecord, build_engine, installed_builder
from coatrt.engines.builders.builder_slots import BuilderSlots, builder_bytes
from coatrt.engines.builders.engine_cache import EngineCache, engine_key
from coatrt.engines.bundles.contents import export_config, export_shared
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.prepare import Job, Preparation
from coatrt.engines.bundles.seal import Parts, seal_bundle
from coatrt.engines.bundles.targets import BundleResult
from coatrt.errors import BuildError, CoatError
from coatrt.export.decoder import decoder_io
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.code_cache import CodeStore
from coatrt.system.progress import Progress, silent

__all__ = ["execute"]

T = TypeVar("T")
_Engine = tuple[BuildRecord | None, bool]
"""The record of a job's engine, None where it has none, and whether the engine came from the cache."""


def execute(
    preparation: Preparation,
    adapter: Adapter,
    checkpoint: Checkpoint,
    *,
    codes: CodeStore | None = None,
    cache: EngineCache | None = None,
    slots: BuilderSlots | None = None,
    progress: Progress = silent,
    tell: Callable[[str], None] | None = None,
) -> list[BundleResult]:
    """Make every bundle of a preparation; none is visible at its place before it is complete.

    Each matrix is encoded once for each format, each distinct configuration becomes one set of graphs, and one engine
    serves all its TensorRT-RTX devices. Graphs are written here while builders run beside. Whatever fails, bundles that
    can be finished are.

    Args:
        preparation: see `coatrt.engines.bundles.prepare`.
        adapter: the trained adapter.
        checkpoint: its model.
        codes: cache of encoded matrices; by default the adapter's.
        cache: engines of earlier builds; None builds all.
        slots: how many builders run at once.
        progress: called after each matrix.
        tell: called with a line for the user as bundles finish.

    Returns:
        One entry per target, in order.

    Raises:
        BuildError: a builder is not installed; nothing was made. Or it refuses a graph, or a bundle cannot be
            written; the other bundles are finished.
        ConfigError: the graphs cannot have as many positions; nothing was made.
    """
    results = dict(preparation.current)
    if preparation.jobs:
        _check(preparation, checkpoint)
        codes = codes or adapter.codes(checkpoint, progress)
        first = preparation.jobs[0].targets[0].output.parent
        first.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".coatrt-", dir=first) as scratch:
            graphs = _Graphs(adapter, checkpoint, codes, preparation, Path(scratch), progress)
            results |= _Builds(preparation, graphs, cache, slots or BuilderSlots(), tell or (lambda _: None)).run()
    return [results[target.output] for target in preparation.targets]


def _check(preparation: Preparation, checkpoint: Checkpoint) -> None:
    """Refuse, before anything is written, a builder that is not installed and more positions than the model has."""
    for form in preparation.options.forms():
        decoder_io(checkpoint, form)
    for job in preparation.jobs if preparation.options.engine else ():
        for device in job.rtx_devices:
            installed_builder(device.builder)


class _Graphs:
    """Writes the files that bundles share, once, and those of one configuration after another."""

    def __init__(
        self,
        adapter: Adapter,
        checkpoint: Checkpoint,
        codes: CodeStore,
        preparation: Preparation,
        scratch: Path,
        progress: Progress,
    ) -> None:
        self._adapter, self._checkpoint, self._codes = adapter, checkpoint, codes
        self._options, self._jobs, self._progress = preparation.options, len(preparation.jobs), progress
        self.shared, self._scratch = scratch / "shared", scratch
        self._shared_facts: dict[str, Any] = {}

    def directory(self, job: Job) -> Path:
        """Return where the files of a configuration are written."""
        return self._scratch / job.config.hash

    def write(self, number: int, job: Job) -> dict[str, Any]:
        """Write the files of job `number`, counted from 0, and return the manifest's facts about all of them."""
        if not self._shared_facts:
            shutil.rmtree(self.shared, ignore_errors=True)
            self.shared.mkdir()
            self._shared_facts = export_shared(self._adapter, self._checkpoint, self.shared)
        directory = self.directory(job)
        directory.mkdir()

        def step(done: int, of: int, stage: str, note: str = "", /) -> None:
            self._progress(number * of + done, self._jobs * of, stage, note)

        facts = export_config(
            self._adapter,
            self._checkpoint,
            job.config,
            self.shared,
            directory,
            self._options,
            codes=self._codes,
            progress=step,
        )
        return {**self._shared_facts, **facts}


class _Builds:
    """Runs builders beside the writing of graphs, and seals bundles as their engines are finished."""

    def __init__(
        self,
        preparation: Preparation,
        graphs: _Graphs,
        cache: EngineCache | None,
        slots: BuilderSlots,
        tell: Callable[[str], None],
    ) -> None:
        self._preparation, self._graphs, self._cache, self._slots, self._tell = preparation, graphs, cache, slots, tell
        self._started = time.monotonic()
        self._running: dict[Future[_Engine], tuple[Job, Mapping[str, Any]]] = {}
        self._results: dict[Path, BundleResult] = {}
        self._failures: list[CoatError] = []

    def run(self) -> dict[Path, BundleResult]:
        """Return the results by place.

        Raises:
            BuildError: some failed.
        """
        options = self._preparation.options
        with ThreadPoolExecutor(self._slots.jobs) as pool:
            try:
                for number, job in enumerate(self._preparation.jobs):
                    facts = self._attempt(partial(self._graphs.write, number, job))
                    if facts is not None:
                        directory = self._graphs.directory(job)
                        future = pool.submit(_engine, job, directory, options, self._cache, self._slots)
                        self._running[future] = job, facts
                    self._collect(block=False)
            finally:
                self._collect(block=True)
        if self._failures:
            self._refuse()
        return self._results

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """Return what some work returns, None where it failed: the failure is raised when all else is finished."""
        try:
            return work()
        except CoatError as error:
            self._failures.append(error)
        except OSError as error:
            self._failures.append(
                BuildError(f"a bundle cannot be written ({error}); check permissions and free disk space, build again")
            )
        return None

    def _collect(self, block: bool) -> None:
        """Seal the bundles whose engine is finished; with `block`, wait for all."""
        while self._running:
            finished, _ = wait(self._running, timeout=None if block else 0, return_when=FIRST_COMPLETED)
            if not finished:
                return
            for future in finished:
                job, facts = self._running.pop(future)
                engine = self._attempt(future.result)
                if engine is not None:
                    self._seal(job, facts, *engine)
                shutil.rmtree(self._graphs.directory(job), ignore_errors=True)

    def _seal(self, job: Job, facts: Mapping[str, Any], record: BuildRecord | None, cached: bool) -> None:
        parts = Parts((self._graphs.shared, self._graphs.directory(job)), facts, record)
        for target in job.targets:
            fingerprint = self._preparation.fingerprints[target.output]
            bundle = self._attempt(
                partial(seal_bundle, target, parts, self._preparation.options, fingerprint, self._tell)
            )
            if bundle is None:
                continue
            seconds = time.monotonic() - self._started
            result = BundleResult(target, bundle, "cached" if cached else "built", seconds)
            self._results[target.output] = result
            if len(self._preparation.targets) > 1:
                self._tell(f"{target.device.id}: {result.state} after {seconds:.0f} s")

    def _refuse(self) -> None:
        wanted = len(self._preparation.targets)
        if wanted == 1:
            raise self._failures[0]
        lost = wanted - len(self._results) - len(self._preparation.current)
        raise BuildError(f"{lost} of {wanted} bundles failed, the others are finished: {self._failures[0]}")


def _engine(
    job: Job, directory: Path, options: BundleOptions, cache: EngineCache | None, slots: BuilderSlots
) -> _Engine:
    """Return the engine that all TensorRT-RTX devices of a job share, from the cache or built."""
    devices = job.rtx_devices
    if not devices or not options.engine:
        return None, False
    sms = [device.sm for device in devices]
    engine = directory / ("-".join(f"sm{sm}" for sm in sms) + ".engine")
    key = engine_key(directory, devices[0].builder, options.shapes) if cache is not None else ""
    if cache is not None and (found := cache.fetch(key, sms, engine)) is not None:
        return found, True
    with slots.take(builder_bytes((directory / "weights.bin").stat().st_size)):
        record = build_engine(directory / "base.onnx", engine, devices[0], also=devices[1:], shapes=options.shapes)
    if cache is not None:
        cache.keep(key, engine, record)
    return record, False
