"""The limits of a plan: which hold, which bind, what the next step of each changes, what would be feasible."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coatrt.devices.profiles import DeviceProfile
from coatrt.errors import ConfigError
from coatrt.planning.memory import Workload
from coatrt.planning.plan import LATENCY_MAX_LOSS, Objective, PlanRequest

__all__ = ["EVERYTHING_FITS", "Limit", "Measures", "best", "binding", "impossible", "keeps_all", "limits_of"]

_MIB = 2**20

EVERYTHING_FITS = "everything fits"
"""What binds a plan for quality that no limit decides."""

_WITHIN_NOISE = 0.01
"""Share of the time per token below which a change is within the noise of the prediction."""


@dataclass(frozen=True)
class Measures:
    """What is predicted of every candidate, arrays [n].

    Args:
        total: bytes in all.
        seconds: predicted seconds per token; bytes where speeds are unknown.
        loss: predicted loss increase, nats per token.
        bits: bits per weight.
        timed: whether `seconds` are seconds, not bytes.
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
        """The candidates within the limit, as a mask."""
        return np.asarray(self.measure <= self.value * (1 + 1e-12))

    def label(self) -> str:
        """Return the limit as the user gave it."""
        return {
            "memory": "memory",
            "bits": f"--bits {self.value:g}",
            "loss": f"predicted loss ≤ {self.value:g}",
            "speed": f"tokens/s ≥ {1 / self.value:g}",
        }[self.kind]

    def shown(self, value: float) -> str:
        """Return the option that sets the limit to a value of the measure."""
        return {
            "memory": f"--memory {np.ceil(value / _MIB):.0f}MiB",
            "bits": f"--bits {np.ceil(value * 1000) / 1000:g}",
            "loss": f"--max-loss {np.ceil(value * 1e4) / 1e4:g}",
            "speed": f"--min-tokens-per-second {np.floor(100 / value) / 100:g}",
        }[self.kind]


def limits_of(request: PlanRequest, device: DeviceProfile, measures: Measures) -> list[Limit]:
    """Return the limits of a request on a device.

    Raises:
        ConfigError: the request limits the speed, which cannot be predicted.
    """
    speed = request.min_tokens_per_second
    if speed is not None and not measures.timed:
        raise ConfigError(
            f"--min-tokens-per-second needs the speed of {device.id}, which is unknown; "
            "measure it on that machine: coatrt devices calibrate ADAPTER"
        )
    caps = (
        ("memory", request.memory if request.memory is not None else device.memory_bytes, measures.total),
        ("bits", request.bits, measures.bits),
        ("loss", request.loss_limit, measures.loss),
        ("speed", 1 / speed if speed is not None else None, measures.seconds),
    )
    return [Limit(kind, value, measure) for kind, value, measure in caps if value is not None]


def keeps_all(limits: Sequence[Limit], count: int) -> NDArray[np.bool_]:
    """Return which of `count` candidates keep every limit."""
    return np.asarray(np.logical_and.reduce([np.ones(count, bool), *(limit.holds for limit in limits)]))


def best(objective: Objective, mask: NDArray[np.bool_], measures: Measures) -> int:
    """Return the best candidate under a mask for an objective; of equal ones the smallest."""
    rows = np.flatnonzero(mask)
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
    """Return which limits decide a pick, and what the next step of each would change.

    A limit binds if a candidate that breaks only this one is better. The next step is the one nearest to the limit
    that is better by a tenth, or the best one if none is. If no limit decides a plan for quality, the next steps are
    smaller limits, and what they would change.
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
        return EVERYTHING_FITS, _smaller(limits, index, measures)
    return " and ".join(names) or "least time of all candidates", tuple(steps)


def _change(measures: Measures, old: int, new: int) -> str:
    parts = [
        f"predicted loss by {measures.loss[new] - measures.loss[old]:+.4f}",
        f"memory by {(measures.total[new] - measures.total[old]) / _MIB:+.2f} MiB",
    ]
    if measures.timed:
        change = float(measures.seconds[new] / measures.seconds[old] - 1)
        parts.append(f"time per token {f'by {change:+.0%}' if abs(change) >= _WITHIN_NOISE else 'within noise'}")
    return ", ".join(parts)


def _smaller(limits: Sequence[Limit], index: int, measures: Measures) -> tuple[str, ...]:
    """Return what tighter limits would change where none decides: one of bits or memory, and one of time.

    The limit of bits is one bit above the least, rounded up to half a bit, or half of the way to the least.
    """
    feasible, steps = keeps_all(limits, len(measures.total)), []
    least, most = float(measures.bits[feasible].min()), float(measures.bits[index])
    bits = np.ceil(2 * (least + 1)) / 2
    if bits >= most:
        bits = np.ceil(100 * (least + most) / 2) / 100
    within = feasible & (measures.bits <= bits)
    if within.any() and bits < most:
        step = best("quality", within, measures)
        options = f"--bits {bits:g}"
        if measures.total[step] + _MIB <= measures.total[index]:  # a small model may gain more kernels than it saves
            options += f" or --memory {np.ceil(measures.total[step] / _MIB):.0f}MiB"
        steps.append(f"{options} would change {_change(measures, index, step)}")
    within = feasible & (measures.loss <= LATENCY_MAX_LOSS)
    if measures.timed and within.any():
        step = best("latency", within, measures)
        if measures.seconds[step] < (1 - _WITHIN_NOISE) * measures.seconds[index]:
            steps.append(f"--objective latency would change {_change(measures, index, step)}")
    return tuple(steps)


def impossible(device: DeviceProfile, limits: Sequence[Limit], workload: Workload, measures: Measures) -> str:
    """Return why no candidate keeps the limits, and which limits would be feasible."""
    count = len(measures.total)
    for limit in limits:  # a limit that no candidate keeps, whatever the others
        if limit.holds.any():
            continue
        least = float(limit.measure.min())
        if limit.kind == "memory":
            return _too_little_memory(device, limit, workload, least)
        if limit.kind == "bits":
            return (
                f"--bits must be at least {np.ceil(least * 1000) / 1000:g} on {device.id}, got {limit.value:g}; "
                "fewer bits need an adapter trained on smaller formats"
            )
        if limit.kind == "loss":
            return (
                f"a predicted loss increase of {limit.value:g} is not feasible on {device.id}: the least is "
                f"{least:.4f}; try {limit.shown(least)}, or an adapter trained on larger formats"
            )
        return (
            f"{1 / limit.value:g} tokens/s are not feasible on {device.id}: the most predicted is {1 / least:.1f}; "
            f"try {limit.shown(least)}, or a lower --context"
        )
    ways = []
    for limit in limits:
        others = keeps_all([other for other in limits if other is not limit], count)
        if others.any():
            ways.append(limit.shown(float(limit.measure[others].min())))
    names = ", ".join(limit.label() for limit in limits)
    return (
        f"no configuration for {device.id} keeps all limits ({names}); "
        f"{'change one: ' + ' or '.join(ways) if ways else 'loosen at least two of them'}"
    )


def _too_little_memory(device: DeviceProfile, limit: Limit, workload: Workload, least: float) -> str:
    slot = workload.kv_bytes / workload.context
    fits = int((limit.value - least + workload.kv_bytes) // slot) if slot else 0
    context = f" (at most {fits} here)" if fits >= 1 else ""
    return (
        f"not enough memory on {device.id}: the model needs at least {np.ceil(least / _MIB):.0f} MiB (KV cache "
        f"{workload.kv_bytes / _MIB:.0f}), the limit is {limit.value / _MIB:.0f} MiB; try a higher --memory, a lower "
        f"--context{context} or --batch, or an adapter trained on smaller formats"
    )
