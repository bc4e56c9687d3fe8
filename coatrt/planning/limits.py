"""The limits of a plan: what holds, what binds, what a little more would buy, and what would make it feasible."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coatrt.devices.profiles import DeviceProfile
from coatrt.errors import ConfigError
from coatrt.planning.memory import Workload
from coatrt.planning.plan import Objective, PlanRequest

__all__ = ["Limit", "Measures", "best", "binding", "impossible", "keeps_all", "limits_of"]

_MIB = 2**20


@dataclass(frozen=True)
class Measures:
    """What every candidate comes to, arrays [n].

    Args:
        total: bytes in all.
        seconds: predicted seconds per token; bytes where speeds are unknown.
        loss: predicted loss increase, nats per token.
        bits: bits per weight.
        timed: whether `seconds` are seconds.
    """

    total: NDArray[np.float64]
    seconds: NDArray[np.float64]
    loss: NDArray[np.float64]
    bits: NDArray[np.float64]
    timed: bool


@dataclass(frozen=True)
class Limit:
    """A cap on one measure.

    Args:
        kind: "memory", "bits", "loss" or "speed".
        value: the cap, in the unit of the measure.
        measure: values of all candidates.
    """

    kind: str
    value: float
    measure: NDArray[np.float64]

    @property
    def holds(self) -> NDArray[np.bool_]:
        """Which candidates keep it."""
        return np.asarray(self.measure <= self.value * (1 + 1e-12))

    def label(self) -> str:
        """Return the limit in the user's words."""
        return {
            "memory": "memory",
            "bits": f"--bits {self.value:g}",
            "loss": f"predicted loss ≤ {self.value:g}",
            "speed": f"tokens/s ≥ {1 / self.value:g}",
        }[self.kind]

    def shown(self, value: float) -> str:
        """Return a value of the measure with its option."""
        return {
            "memory": f"--memory {np.ceil(value / _MIB):.0f}MiB",
            "bits": f"--bits {np.ceil(value * 1000) / 1000:g}",
            "loss": f"--max-loss {np.ceil(value * 1e4) / 1e4:g}",
            "speed": f"--min-tokens-per-second {np.floor(100 / value) / 100:g}",
        }[self.kind]


def limits_of(request: PlanRequest, device: DeviceProfile, measures: Measures) -> list[Limit]:
    """Return the limits of a request on a device.

    Raises:
        ConfigError: a speed is asked for where none can be predicted.
    """
    speed = request.min_tokens_per_second
    if speed is not None and not measures.timed:
        raise ConfigError(
            f"--min-tokens-per-second is given and nothing is known of the speed of {device.id}; "
            "measure it there: coatrt devices calibrate ADAPTER"
        )
    asked = (
        ("memory", request.memory if request.memory is not None else device.memory_bytes, measures.total),
        ("bits", request.bits, measures.bits),
        ("loss", request.loss_limit, measures.loss),
        ("speed", 1 / speed if speed is not None else None, measures.seconds),
    )
    return [Limit(kind, value, measure) for kind, value, measure in asked if value is not None]


def keeps_all(limits: Sequence[Limit], count: int) -> NDArray[np.bool_]:
    """Return which of `count` candidates keep every limit."""
    return np.asarray(np.logical_and.reduce([np.ones(count, bool), *(limit.holds for limit in limits)]))


def best(objective: Objective, kept: NDArray[np.bool_], measures: Measures) -> int:
    """Return the candidate under `kept` that serves the objective best; ties go to fewer bytes."""
    rows = np.flatnonzero(kept)
    total, seconds, loss = measures.total[rows], measures.seconds[rows], measures.loss[rows]
    if objective == "quality":
        order = np.lexsort((seconds, total, loss))
    elif objective == "latency":
        order = np.lexsort((total, loss, seconds))
    else:
        scaled = sum((part - part.min()) / max(float(np.ptp(part)), 1e-300) for part in (seconds, loss))
        order = np.lexsort((total, scaled))
    return int(rows[order[0]])


def binding(
    objective: Objective, limits: Sequence[Limit], index: int, measures: Measures
) -> tuple[str, tuple[str, ...]]:
    """Return which limits decide a pick, and what the next step of each would buy.

    A limit binds where a candidate that breaks only this one is better. The next step is the one nearest to the limit
    that is better by a tenth, or the best one where none is.
    """
    aim = measures.seconds if objective == "latency" else measures.loss
    names, steps = [], []
    for limit in limits:
        others = keeps_all([other for other in limits if other is not limit], len(aim))
        better = np.flatnonzero(others & ~limit.holds & (aim < aim[index]))
        if not len(better):
            continue
        names.append(limit.label())
        far = better[aim[better] <= max(float(aim[better].min()), 0.9 * aim[index])]
        step = int(far[np.lexsort((aim[far], limit.measure[far]))[0]])
        steps.append(f"{limit.shown(float(limit.measure[step]))} would change {_change(measures, index, step)}")
    if objective == "balanced":
        return " and ".join(["knee of speed and loss", *names]), tuple(steps)
    if objective == "quality" and not names:
        return "nothing binds", ()
    return " and ".join(names) or "least time of all candidates", tuple(steps)


def _change(measures: Measures, old: int, new: int) -> str:
    parts = [
        f"predicted loss by {measures.loss[new] - measures.loss[old]:+.4f}",
        f"memory by {(measures.total[new] - measures.total[old]) / _MIB:+.2f} MiB",
    ]
    if measures.timed:
        parts.append(f"time per token by {(measures.seconds[new] / measures.seconds[old] - 1) * 100:+.2f} %")
    return ", ".join(parts)


def impossible(device: DeviceProfile, limits: Sequence[Limit], workload: Workload, measures: Measures) -> str:
    """Return why no candidate keeps the limits, and what would."""
    count = len(measures.total)
    for limit in limits:  # a limit that nothing keeps, whatever the others
        if limit.holds.any():
            continue
        least = float(limit.measure.min())
        if limit.kind == "memory":
            return _no_room(device, limit, workload, least)
        if limit.kind == "bits":
            return f"--bits {limit.value:g} is below what the formats allow; the least here is {least:.3f}"
        if limit.kind == "loss":
            return (
                f"a predicted loss of {limit.value:g} is not feasible on {device.id}: the least with its formats is "
                f"{least:.4f}; give {limit.shown(least)} or train with larger formats"
            )
        return (
            f"{1 / limit.value:g} tokens/s are not feasible on {device.id}: at most {1 / least:.1f} are predicted; "
            f"give {limit.shown(least)}, or lower --context"
        )
    ways = []
    for limit in limits:
        others = keeps_all([other for other in limits if other is not limit], count)
        if others.any():
            ways.append(limit.shown(float(limit.measure[others].min())))
    asked = ", ".join(limit.label() for limit in limits)
    return (
        f"no configuration for {device.id} keeps {asked} together; "
        f"{'change one: ' + ' or '.join(ways) if ways else 'loosen two of them'}"
    )


def _no_room(device: DeviceProfile, limit: Limit, workload: Workload, least: float) -> str:
    slot = workload.kv_bytes / workload.context
    fits = int((limit.value - least + workload.kv_bytes) // slot) if slot else 0
    context = f" (at most {fits} here)" if fits >= 1 else ""
    return (
        f"{device.id} with {limit.value / _MIB:.0f} MiB cannot hold the model; it needs {np.ceil(least / _MIB):.0f} "
        f"MiB at least (KV cache {workload.kv_bytes / _MIB:.0f}); raise --memory, lower --context{context} or --batch, "
        "or train with smaller formats"
    )
