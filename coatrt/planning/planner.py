"""Plans: the configuration that serves an objective best on one device within limits of memory, speed and loss."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.devices.profiles import DeviceProfile
from coatrt.errors import ConfigError, DeviceError
from coatrt.planning.archive import Archive
from coatrt.planning.candidates import Candidates, candidates
from coatrt.planning.engine_size import overhead_of_choices
from coatrt.planning.knapsack import CostTable, cost_matrix
from coatrt.planning.latency import DatasheetLatency, LatencyModel, group_seconds
from coatrt.planning.limits import Limit, Measures, best, binding, impossible, limits_of
from coatrt.planning.measured_latency import find_calibration
from coatrt.planning.memory import fixed_memory, memory_of
from coatrt.planning.pareto import pareto_indices
from coatrt.planning.pins import pinned_costs
from coatrt.planning.plan import Objective, Plan, PlanRequest
from coatrt.planning.workload import Workload

if TYPE_CHECKING:
    from coatrt.adapter.adapter import Adapter
    from coatrt.adapter.description import AdapterFacts

__all__ = ["Objective", "Plan", "PlanRequest", "Workload", "latency_of", "make_plan", "plan_fleet", "plan_for"]

_FRONT_POINTS = 80
_HELD = 16


def latency_of(device: DeviceProfile, space: ConfigSpace, workload: Workload) -> LatencyModel | None:
    """Return what predicts seconds on a device: its calibration, else its datasheet, None where neither is known."""
    calibration = find_calibration(device.id, space, workload)
    if calibration is not None:
        return calibration
    return DatasheetLatency(device) if device.bandwidth else None


class _Problem:
    """One device's candidates, and what any configuration comes to there."""

    def __init__(
        self,
        space: ConfigSpace,
        cost: NDArray[np.float64],
        device: DeviceProfile,
        workload: Workload,
        request: PlanRequest,
        latency: LatencyModel | None,
    ) -> None:
        self.space, self.cost, self.device, self.workload, self.latency = space, cost, device, workload, latency
        timed = latency is not None
        self.seconds = group_seconds(space, latency, request.batch) if latency is not None else None
        self.rest = (
            latency.rest_seconds(space.model, workload, request.batch, request.context) if latency is not None else 0.0
        )
        self.found = _candidates(space, cost, self.seconds)
        self.fixed = sum(fixed_memory(space.model, device, workload).values())
        self.measures = self._measures(self.found.choices, timed)
        self.limits = limits_of(request, device, self.measures)

    def _measures(self, choices: NDArray[np.int16], timed: bool) -> Measures:
        rows, space = np.arange(len(self.cost)), self.space
        nbytes = space.sizes[rows, choices].sum(1)
        total = nbytes + overhead_of_choices(space, choices, self.device.sm) + self.fixed
        seconds = self.seconds[rows, choices].sum(1) if self.seconds is not None else nbytes
        loss = np.where(np.isfinite(self.cost), self.cost, 0.0)[rows, choices].sum(1)
        bits = 8 * nbytes / space.model.parameters
        return Measures(total.astype(np.float64), seconds + self.rest, loss, bits, timed)

    def kept(self) -> NDArray[np.bool_]:
        """Return which candidates keep every limit."""
        result = np.ones(len(self.found), bool)
        for limit in self.limits:
            result &= limit.holds
        return result

    def measured(self, config: QuantConfig) -> tuple[NDArray[np.int16], Measures, bool]:
        """Return a configuration of the space as a choice, what it comes to, and whether it keeps every limit."""
        column = {fmt: i for i, fmt in enumerate(self.space.formats)}
        choice = np.array([[column[config[group[0]]] for group in self.space.groups]], np.int16)
        measures = self._measures(choice, self.latency is not None)
        values = {"memory": measures.total, "bits": measures.bits, "loss": measures.loss, "speed": measures.seconds}
        allowed = bool(np.isfinite(self.cost[np.arange(len(self.cost)), choice[0]]).all())
        keeps = all(Limit(limit.kind, limit.value, values[limit.kind]).holds[0] for limit in self.limits)
        return choice, measures, allowed and keeps


_kept: "OrderedDict[str, Candidates]" = OrderedDict()


def _candidates(space: ConfigSpace, cost: NDArray[np.float64], seconds: NDArray[np.float64] | None) -> Candidates:
    """Return the candidates, those of devices of the same formats and relative speeds made once."""
    relative = None
    if seconds is not None:  # what every format of a group takes alike decides nothing; a rough direction is enough
        apart = seconds - seconds.min(1, keepdims=True)
        relative = np.round(apart / max(float(apart.max()), 1e-300), 2)
    digest = hashlib.sha256(repr((space.groups, [str(fmt) for fmt in space.formats])).encode())
    digest.update(cost.tobytes() + space.sizes.tobytes() + (relative.tobytes() if relative is not None else b""))
    key = digest.hexdigest()
    if key not in _kept:
        _kept[key] = candidates(space, cost, relative)
        while len(_kept) > _HELD:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return _kept[key]


def make_plan(
    space: ConfigSpace,
    costs: CostTable,
    device: DeviceProfile,
    workload: Workload,
    request: PlanRequest | None = None,
    *,
    archive: Archive | None = None,
    latency: LatencyModel | None = None,
    adapter: str = "",
) -> Plan:
    """Return the plan that serves the request's objective best.

    It is picked from one fixed set of candidates (`coatrt.planning.candidates`), whatever the limits, so that more
    memory never gives a worse predicted loss and a tighter budget never more bytes.

    Args:
        space: the adapter's space; formats the device lacks are left out.
        costs: predicted loss increase by matrix and format.
        device: the target.
        workload: KV cache, LoRA and activations to leave room for.
        request: objective, limits and pins.
        archive: measured configurations. For "quality", the measured one of least loss that keeps the limits is taken
            where the measured one nearest to the pick in bytes lost more.
        latency: what predicts seconds; by default `latency_of`.
        adapter: hash of the adapter, kept in the plan.

    Raises:
        DeviceError: the device allows none of the space's formats.
        ConfigError: nothing keeps the limits; the message says what would.
    """
    request = request or PlanRequest()
    allowed = [fmt for fmt in space.formats if device.supports(fmt)]
    if not allowed:
        raise DeviceError(
            f"{device.id} supports none of the adapter's formats ({', '.join(map(str, space.formats))}); "
            "train an adapter on formats it has (coatrt devices)"
        )
    space = space.restrict(allowed)
    latency = latency or latency_of(device, space, workload)
    cost = pinned_costs(space, cost_matrix(space, costs), request.keep, device)
    problem = _Problem(space, cost, device, workload, request, latency)
    kept = problem.kept()
    if not kept.any():
        raise ConfigError(impossible(device, problem.limits, workload, problem.measures))
    index = best(request.objective, kept, problem.measures)
    binds, steps = binding(request.objective, problem.limits, index, problem.measures)
    config = problem.found.config(index)
    if request.objective == "quality" and archive is not None:
        better = _better_measured(config, archive, problem)
        if better != config:
            config, steps = better, ()
    return _described(config, problem, request, binds, steps, archive, adapter)


def _described(
    config: QuantConfig,
    problem: _Problem,
    request: PlanRequest,
    binds: str,
    steps: tuple[str, ...],
    archive: Archive | None,
    adapter: str,
) -> Plan:
    device, workload, latency, model = problem.device, problem.workload, problem.latency, problem.space.model
    memory = memory_of(config, model, device, workload)
    _, measures, _ = problem.measured(config)
    per_token = sum(memory[name] for name in ("weights", "scales", "other tensors", "LoRA", "KV cache"))
    prefill = None
    if latency is not None:
        rows, tokens = request.batch, request.batch * request.prefill
        prefill = latency.rest_seconds(model, workload, tokens, request.prefill) + sum(
            latency.matrix_seconds(matrix.N, matrix.K, config[matrix.name], rows if matrix.is_table else tokens)
            for matrix in model.matrices
            if matrix.name == model.names[-1] or not matrix.is_table or model.tied
        )
    entry = archive.find(config) if archive is not None else None
    return Plan(
        device=device.id,
        request=request,
        binds=binds,
        config=config,
        average_bits=config.average_bits(model),
        memory=memory,
        limit_bytes=request.memory if request.memory is not None else device.memory_bytes,
        predicted_loss_increase=float(measures.loss[0]),
        bytes_per_token=per_token,
        tokens_per_second_bound=device.bandwidth / per_token if device.bandwidth else None,
        decode_seconds=float(measures.seconds[0]) if latency is not None else None,
        prefill_seconds=prefill,
        latency_source=latency.source if latency is not None else "",
        next_steps=steps,
        front=_front(problem),
        measured_loss=entry.loss if entry is not None else None,
        adapter=adapter,
    )


def _front(problem: _Problem) -> tuple[tuple[int, float | None, float], ...]:
    """Return some of the candidates that no other beats in bytes and loss, or in seconds and loss, by bytes."""
    measures = problem.measures
    rows = [pareto_indices(np.stack([measures.total, measures.loss], 1))]
    if measures.timed:
        rows.append(pareto_indices(np.stack([measures.seconds, measures.loss], 1)))
    some = {int(part[i]) for part in rows for i in np.linspace(0, len(part) - 1, _FRONT_POINTS).round().astype(int)}
    return tuple(
        (int(measures.total[i]), float(measures.seconds[i]) if measures.timed else None, float(measures.loss[i]))
        for i in sorted(some, key=lambda i: (measures.total[i], measures.loss[i]))
    )


def _better_measured(config: QuantConfig, archive: Archive, problem: _Problem) -> QuantConfig:
    """Return the measured configuration to take in place of a picked one, or the picked one.

    A pick is hardly ever among the measured ones; the nearest in bytes that keeps the limits stands for it.
    """
    model = problem.space.model
    sizes = {
        entry: entry.config.nbytes(model)
        for entry in archive
        if problem.space.contains(entry.config)
        and _grouped(entry.config, problem.space)
        and problem.measured(entry.config)[2]
    }
    if not sizes:
        return config
    wanted = config.nbytes(model)
    nearest = min(sizes, key=lambda entry: (abs(sizes[entry] - wanted), entry.config != config))
    measured_best = min(sizes, key=lambda entry: (entry.loss, sizes[entry]))
    return measured_best.config if measured_best.loss < nearest.loss else config


def _grouped(config: QuantConfig, space: ConfigSpace) -> bool:
    """Return whether every fused group has one format."""
    return all(len({config[name] for name in group}) == 1 for group in space.groups)


def plan_for(
    adapter: "Adapter | AdapterFacts",
    device: DeviceProfile,
    request: PlanRequest | None = None,
    *,
    archive: Archive | None = None,
    latency: LatencyModel | None = None,
    **asked: Any,
) -> Plan:
    """Return the plan of an adapter for a device.

    Args:
        adapter: gives the space, the sensitivities and the size of the LoRA.
        device: the target.
        request: what is asked.
        archive: see `make_plan`.
        latency: see `make_plan`.
        asked: fields of `PlanRequest`, in place of a request.

    Raises:
        DeviceError: the device allows none of the adapter's formats.
        ConfigError: nothing fits, or an option is out of range.
    """
    request = request or PlanRequest(**asked)
    lora = sum(rows * columns for rows, columns in adapter.contract.shapes.values())
    workload = Workload.of(
        adapter.model_config, request.context, request.batch, request.prefill, lora, 2 if device.sm else 4
    )
    return make_plan(
        adapter.space,
        adapter.sensitivity.costs,
        device,
        workload,
        request,
        archive=archive,
        latency=latency,
        adapter=adapter.hash,
    )


def plan_fleet(
    adapter: "Adapter | AdapterFacts",
    devices: Iterable[DeviceProfile],
    request: PlanRequest | None = None,
    *,
    archive: Archive | None = None,
) -> list[Plan]:
    """Return one plan per device for the same request, see `plan_for`."""
    return [plan_for(adapter, device, request, archive=archive) for device in devices]
