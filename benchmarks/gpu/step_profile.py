"""Profile of one training step: kernel launches and waits for the GPU by part of the step; needs torch only."""

import bisect
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["PARTS", "Run", "peak_memory", "profile_step"]

PARTS = (
    ("coatrt.evaluation.fake_quant", "FakeQuantModel", "set_config", "weights"),
    ("coatrt.adapter.lora", "CoaLora", "pairs", "pairs"),
    ("torch", "nn.Module", "__call__", "forward"),
    ("torch", "Tensor", "backward", "backward"),
    ("torch", "optim.AdamW", "step", "optimizer"),
)
"""(module, class, method, what the part is called); the outermost part counts."""

_WARM = 3  # steps before anything is measured

Run = Callable[[int, Callable[[int], None]], None]
"""Does a number of steps, calling what it is given with their count before each and after the last."""


class _Parts:
    """Records the begin and end of every part of a step."""

    def __init__(self) -> None:
        self._edges: list[tuple[int, str]] = []
        self._open: list[str] = ["rest"]

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Wrap the methods of `PARTS` for a while."""
        undo: list[tuple[Any, str, Any]] = []
        for module, owner, method, part in PARTS:
            found: Any = sys.modules.get(module)
            for name in owner.split("."):
                found = getattr(found, name, None)
            if found is not None:
                undo.append((found, method, found.__dict__[method]))
                setattr(found, method, self._wrapped(found.__dict__[method], part))
        try:
            yield
        finally:
            for found, method, old in undo:
                setattr(found, method, old)

    def _wrapped(self, old: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._open[-1] != "rest":
                return old(*args, **kwargs)
            self._open.append(part)
            self._edges.append((time.time_ns(), part))
            try:
                return old(*args, **kwargs)
            finally:
                self._open.pop()
                self._edges.append((time.time_ns(), self._open[-1]))

        return call

    def at(self, moment: int) -> str:
        """Return the part that a moment, nanoseconds of the epoch, belongs to."""
        place = bisect.bisect(self._edges, (moment, "\uffff")) - 1
        return self._edges[place][1] if place >= 0 else "rest"

    def host_ms(self, began: int, ended: int) -> dict[str, float]:
        """Return the milliseconds of each part between two moments."""
        times: dict[str, float] = defaultdict(float)
        now, part = began, "rest"
        for moment, following in [*self._edges, (ended, "")]:
            times[part] += (moment - now) / 1e6
            now, part = moment, following
        return {name: round(value, 2) for name, value in times.items()}


def peak_memory(run: Run, cuda: bool) -> dict[str, float]:
    """Return the peak memory of a training's second step."""

    def between(step: int) -> None:
        if cuda and step == 1:
            torch.cuda.reset_peak_memory_stats()

    run(2, between)
    return {"peak_mb": round(torch.cuda.max_memory_allocated() / 1e6, 1)} if cuda else {}


def profile_step(run: Run, cuda: bool) -> dict[str, Any]:
    """Return the launches, waits, duration and peak memory of one step of a training.

    Args:
        run: the training.
        cuda: whether it computes on a GPU; without one only times are found.
    """
    parts, plain, found = _Parts(), _Parts(), dict[str, Any]()
    profiler = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])
    caught = warnings.catch_warnings(record=True)
    seen: list[warnings.WarningMessage] = []
    began, notes = 0, None

    def between(step: int) -> None:
        nonlocal began, notes, seen
        if cuda:
            torch.cuda.synchronize()
        now = time.time_ns()
        if step == _WARM:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            notes = plain.noted()
            notes.__enter__()
            began = time.time_ns()
        elif step == _WARM + 1:
            notes.__exit__(None, None, None)
            found["step_ms"] = round((now - began) / 1e6, 2)
            found["host_ms"] = plain.host_ms(began, now)
            if cuda:
                found["peak_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
            notes = parts.noted()
            notes.__enter__()
            profiler.__enter__()
        elif step == _WARM + 2:
            profiler.__exit__(None, None, None)
            notes.__exit__(None, None, None)
            if cuda:
                seen = caught.__enter__()
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
        elif step == _WARM + 3 and cuda:
            torch.cuda.set_sync_debug_mode("default")
            caught.__exit__(None, None, None)

    run(_WARM + 3, between)
    found.update(_counts(profiler, parts))
    synchronizing = [note for note in seen if "synchroniz" in str(note.message)]
    places = Counter(f"{Path(note.filename).name}:{note.lineno}" for note in synchronizing)
    return {**found, "waits": len(synchronizing), "waits_at": dict(places.most_common(12))}


def _counts(profiler: Any, parts: _Parts) -> dict[str, Any]:
    """Return the calls of CUDA's runtime by name and by part, and the GPU's time."""
    calls: Counter[str] = Counter()
    spent: dict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in profiler.profiler.kineto_results.events():
        name, milliseconds = event.name(), event.duration_ns() / 1e6
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            if name.startswith("Mem"):
                copies[name] += 1
            kernels[name.split("<")[0][:60]][0] += 1
            kernels[name.split("<")[0][:60]][1] += milliseconds
        elif name.startswith("cu"):
            calls[name] += 1
            spent[name] += milliseconds
            if "Launch" in name:
                launches[parts.at(event.start_ns())] += 1
    top = sorted(kernels.items(), key=lambda item: -item[1][0])[:12]
    return {
        "launches": sum(launches.values()),
        "launches_by_part": dict(launches),
        "calls": {name: [count, round(spent[name], 2)] for name, count in calls.most_common(12)},
        "copies": dict(copies),
        "gpu_busy_ms": round(sum(value[1] for value in kernels.values()), 2),
        "kernels": {name: [int(count), round(value, 2)] for name, (count, value) in top},
    }
