"""Executes a build: writes shared files once, then graphs per configuration, with builders in parallel."""

import contextlib
import shutil
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from coatrt.adapter.adapter import Adapter
from coatrt.engines.builders.builder import BuildRecord, build_engine, installed_builder
from coatrt.engines.builders.builder_slots import BuilderSlots, builder_bytes
from coatrt.engines.builders.engine_cache import EngineCache, engine_key
from coatrt.engines.bundles.contents import export_config, export_shared
from coatrt.engines.bundles.prepare import Job, Preparation
from coatrt.engines.bundles.seal import seal_bundle
from coatrt.engines.bundles.targets import BundleResult
from coatrt.errors import BuildError, CoatError
from coatrt.export.preflight import preflight
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.code_cache import CodeStore
from coatrt.system.disk import writing
from coatrt.system.processes import end_children
from coatrt.system.progress import Progress, silent
from coatrt.system.scratch import scratch

__all__ = ["execute"]

T = TypeVar("T")
_Engine = tuple[BuildRecord | None, bool]
"""The record of a job's engine (None without engine), and whether the engine came from the cache."""


def execute(
    preparation: Preparation,
    adapter: Adapter,
    checkpoint: Checkpoint,
    *,
    cache: EngineCache | None = None,
    slots: BuilderSlots | None = None,
    progress: Progress = silent,
    tell: Callable[[str], None] | None = None,
) -> list[BundleResult]:
    """Build every bundle of a preparation; a bundle appears in its directory only when it is complete.

    Each matrix is encoded once per format, each distinct configuration becomes one set of graphs, and one engine runs
    on all its TensorRT-RTX devices. Graphs are written here while builders run in parallel. A failure does not keep
    other bundles from being finished.

    Args:
        preparation: see `coatrt.engines.bundles.prepare`.
        adapter: the trained adapter.
        checkpoint: its model.
        cache: cache of engines; None builds every engine.
        slots: limit on the builders that run at once.
        progress: called after each matrix and engine.
        tell: called with a line for the user as bundles finish.

    Returns:
        One entry per target, in order.

    Raises:
        CheckpointError: a graph would compute other logits than the model, see `preflight`; no bundle is written.
        BuildError: a builder is not installed; no bundle is written. Or a builder refuses a graph, or a bundle cannot
            be written; the other bundles are finished.
    """
    results = dict(preparation.current)
    if preparation.jobs:
        for job in preparation.jobs if preparation.options.engine else ():  # before anything is written
            for device in job.rtx_devices:
                installed_builder(device.builder)
        preflight(checkpoint, progress)
        codes = adapter.codes(checkpoint, progress)
        output = preparation.jobs[0].targets[0].output
        with writing(output), scratch(output.parent, "build") as place:
            slots, tell = slots or BuilderSlots(), _without_errors(tell)
            build = _Build(preparation, adapter, checkpoint, codes, cache, slots, progress, tell, place)
            results |= build.run()
    return [results[target.output] for target in preparation.targets]


def _without_errors(tell: Callable[[str], None] | None) -> Callable[[str], None]:
    """Return a `tell` that ignores output errors: a closed terminal must not fail a bundle."""

    def quiet_tell(line: str) -> None:
        with contextlib.suppress(OSError):
            if tell is not None:
                tell(line)

    return quiet_tell


@dataclass
class _Build:
    """A running build: graphs are written one after another, builders run in parallel, finished bundles are sealed.

    `shared` are the manifest's entries of the files that all bundles share; `running` maps each engine's future to its
    job and the manifest's entries of its configuration's files.
    """

    preparation: Preparation
    adapter: Adapter
    checkpoint: Checkpoint
    codes: CodeStore
    cache: EngineCache | None
    slots: BuilderSlots
    progress: Progress
    tell: Callable[[str], None]
    scratch: Path
    start: float = field(default_factory=time.monotonic)
    shared: dict[str, Any] = field(default_factory=dict)
    running: dict[Future[_Engine], tuple[Job, dict[str, Any]]] = field(default_factory=dict)
    results: dict[Path, BundleResult] = field(default_factory=dict)
    failures: list[CoatError] = field(default_factory=list)

    def run(self) -> dict[Path, BundleResult]:
        """Return the results by output directory.

        Raises:
            BuildError: a bundle failed.
        """
        with ThreadPoolExecutor(self.slots.jobs) as pool:
            try:
                for number, job in enumerate(self.preparation.jobs):
                    facts = self._attempt(partial(self._write, number, job))
                    if facts is not None:
                        self.running[pool.submit(self._engine, job)] = job, facts
                    self._collect(block=False)
                self._collect(block=True)
            except Exception:
                self._collect(block=True)
                raise
            except BaseException:  # Ctrl-C or SIGTERM
                pool.shutdown(wait=False, cancel_futures=True)
                while not all(future.done() for future in self.running):
                    end_children()  # again and again, as a builder may just be starting
                    wait(self.running, timeout=0.1)
                raise
        total = len(self.preparation.targets)
        if self.failures and total == 1:
            raise self.failures[0]
        if self.failures:
            failed = total - len(self.results) - len(self.preparation.current)
            others = "; the others are finished" if failed < total else ""
            raise BuildError(f"{failed} of {total} bundles failed{others}. The first: {self.failures[0]}")
        return self.results

    def _folders(self, job: Job) -> tuple[Path, Path]:
        """Return the directory of the files that all bundles share, and that of a configuration's files."""
        return self.scratch / "shared", self.scratch / job.config.hash

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """Return the result of `work`, or None if it fails; `run` raises the failure when everything else is done."""
        try:
            return work()
        except CoatError as error:
            self.failures.append(error)
        except OSError as error:
            # shutil.Error has a list with a reason per file.
            reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error
            self.failures.append(
                BuildError(f"a bundle cannot be written ({reason}); check permissions and free disk space, build again")
            )
        return None

    def _write(self, number: int, job: Job) -> dict[str, Any]:
        """Write the files of job `number`, counted from 0, and return their entries for the manifest."""
        shared, directory = self._folders(job)
        with writing(job.targets[0].output):
            return self._write_files(number, job, shared, directory)

    def _write_files(self, number: int, job: Job, shared: Path, directory: Path) -> dict[str, Any]:
        if not self.shared:
            shutil.rmtree(shared, ignore_errors=True)
            shared.mkdir()
            self.shared = export_shared(self.adapter, self.checkpoint, shared)
        directory.mkdir()

        def step(count: int, total: int, stage: str, note: str = "", /) -> None:
            self.progress(number * total + count, len(self.preparation.jobs) * total, stage, note)

        return export_config(
            self.adapter,
            self.checkpoint,
            job.config,
            shared,
            directory,
            self.preparation.options,
            codes=self.codes,
            progress=step,
        )

    def _engine(self, job: Job) -> _Engine:
        """Return the engine that all TensorRT-RTX devices of a job share, from the cache or built."""
        devices, options, directory = job.rtx_devices, self.preparation.options, self._folders(job)[1]
        if not devices or not options.engine:
            return None, False
        sms = [device.sm for device in devices]
        engine = directory / ("-".join(f"sm{sm}" for sm in sms) + ".engine")
        key = engine_key(directory, devices[0].builder, options.shapes) if self.cache is not None else ""
        if self.cache is not None and (cached := self.cache.fetch(key, sms, engine)) is not None:
            return cached, True
        with self.slots.take(builder_bytes((directory / "weights.bin").stat().st_size)):
            record = build_engine(directory / "base.onnx", engine, devices[0], also=devices[1:], shapes=options.shapes)
        if self.cache is not None:
            self.cache.store(key, engine, record)
        return record, False

    def _collect(self, block: bool) -> None:
        """Seal the bundles whose engine is finished; with `block`, wait for all."""
        jobs = len(self.preparation.jobs)
        while self.running:
            if block:
                self.progress(jobs - len(self.running), jobs, "engines")
            futures, _ = wait(self.running, timeout=None if block else 0, return_when=FIRST_COMPLETED)
            if not futures:
                return
            for future in futures:
                job, facts = self.running.pop(future)
                engine = self._attempt(future.result)
                if engine is not None:
                    self._seal(job, facts, *engine)
                shutil.rmtree(self._folders(job)[1], ignore_errors=True)

    def _seal(self, job: Job, facts: dict[str, Any], record: BuildRecord | None, cached: bool) -> None:
        for target in job.targets:
            fingerprint = self.preparation.fingerprints[target.output]
            entries = {**self.shared, **facts, "fingerprint": fingerprint}
            folders, options, sign = self._folders(job), self.preparation.options, self.preparation.sign
            work = partial(seal_bundle, target, folders, entries, record, options, self.tell, sign)
            bundle = self._attempt(work)
            if bundle is None:
                continue
            seconds = time.monotonic() - self.start
            result = BundleResult(target, bundle, "cached" if cached else "built", seconds)
            self.results[target.output] = result
            if len(self.preparation.targets) > 1:
                self.tell(f"{target.device.id}: {result.state} after {seconds:.0f} s")
