"""Plans: the best configuration for an objective on one device, within limits of memory, speed and loss."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coatrt.adapter.description import AdapterDescription
from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.devices.profiles import DeviceProfile
from coatrt.errors import ConfigError, DeviceError
from coatrt.planning.archive import Archive
from coatrt.planning.candidates import CandidateCache, candidates
from coatrt.planning.engine_size import overhead_of_choices
from coatrt.planning.knapsack import cost_matrix
from coatrt.planning.latency import group_seconds, latency_of, products_seconds
from coatrt.planning.limits import Measures, best, binding, impossible, keeps_all, limits_of
from coatrt.planning.memory import Workload, fixed_memory, memory_of
from coatrt.planning.pareto import pareto_indices
from coatrt.planning.pins import pinned_costs
from coatrt.planning.plan import Plan, PlanRequest

__all__ = ["plan", "plan_fleet"]

_FRONT_POINTS = 80


def plan(
    adapter: AdapterDescription,
    device: DeviceProfile,
    request: PlanRequest | None = None,
    *,
    archive: Archive | None = None,
    cache: CandidateCache | None = None,
    **changes: Any,
) -> Plan:
    """Return the plan of an adapter for a device that is best for the request's objective.

    It is picked from one fixed set of candidates (`coatrt.planning.candidates`), whatever the limits, so that more
    memory never gives a worse predicted loss and a tighter budget never more bytes.

    Args:
        adapter: its space, sensitivities and LoRA; formats that the device does not support are left out.
        device: the target.
        request: objective, limits and pins.
        archive: measured configurations. For "quality", the measured one of least loss within the limits is taken if
            its loss is below that of the measured one nearest to the pick in bytes.
        cache: candidates of earlier plans; those of this one are added, see `candidates`.
        changes: fields of `PlanRequest` that differ from `request`.

    Raises:
        DeviceError: the device allows none of the adapter's formats.
        ConfigError: no configuration keeps the limits (the message names feasible ones), or an option is out of range.
    """
    request = replace(request or PlanRequest(), **changes)
    problem = _Problem(adapter, device, request, cache)
    feasible = keeps_all(problem.limits, len(problem.candidates))
    if not feasible.any():
        raise ConfigError(impossible(device, problem.limits, problem.workload, problem.measures))
    index = best(request.objective, feasible, problem.measures)
    binds, steps = binding(request.objective, problem.limits, index, problem.measures)
    config = problem.space.config(problem.candidates[index].astype(np.int64))
    if request.objective == "quality" and archive is not None:
        better = _better_measured(config, archive, problem)
        if better != config:
            config, steps = better, ()
    return _described(config, problem, binds, steps, archive)


def plan_fleet(
    adapter: AdapterDescription,
    devices: Iterable[DeviceProfile],
    request: PlanRequest | None = None,
    *,
    archive: Archive | None = None,
) -> list[Plan]:
    """Return one plan per device for the same request, see `plan`."""
    cache: CandidateCache = {}
    return [plan(adapter, device, request, archive=archive, cache=cache) for device in devices]


class _Problem:
    """One device's candidates, and what is predicted of any configuration there."""

    def __init__(
        self, adapter: AdapterDescription, device: DeviceProfile, request: PlanRequest, cache: CandidateCache | None
    ) -> None:
        self.adapter, self.device, self.request = adapter, device, request
        element = 2 if device.sm else 4
        self.workload = Workload.of(adapter, request.context, request.batch, request.prefill, element)
        self.space = space = _device_space(adapter, device)
        self.latency = latency = latency_of(device, space, self.workload)
        self.cost = pinned_costs(
            space, cost_matrix(space, adapter.sensitivity.costs), request.keep, device, adapter.checkpoint_formats
        )
        self.seconds, self.rest = None, 0.0  # without timings and datasheet
        if latency is not None:
            self.seconds = group_seconds(space, latency, request.batch)
            self.rest = latency.rest_seconds(space.model, self.workload, request.batch, request.context)
        self.candidates = candidates(space, self.cost, self.seconds, cache)
        self.fixed = sum(fixed_memory(space.model, device, self.workload).values())
        self.measures = self._measures(self.candidates)
        self.limits = limits_of(request, device, self.measures)

    def _measures(self, choices: NDArray[np.int16]) -> Measures:
        rows, space = np.arange(len(self.cost)), self.space
        nbytes = space.sizes[rows, choices].sum(1)
        total = nbytes + overhead_of_choices(space, choices, self.device.sm) + self.fixed
        seconds = self.seconds[rows, choices].sum(1) if self.seconds is not None else nbytes
        loss = np.where(np.isfinite(self.cost), self.cost, 0.0)[rows, choices].sum(1)
        bits = 8 * nbytes / space.model.parameters
        return Measures(total.astype(np.float64), seconds + self.rest, loss, bits, self.latency is not None)

    def of_config(self, config: QuantConfig) -> Measures:
        """Return what is predicted of a configuration of the space."""
        return self._measures(self._choice(config)[None])

    def allows(self, config: QuantConfig) -> bool:
        """Return whether a configuration is one of the space, fused groups in one format, and keeps pins and limits."""
        if not self.space.contains(config) or self.space.config(self._choice(config).tolist()) != config:
            return False
        pinned = np.isfinite(self.cost[np.arange(len(self.cost)), self._choice(config)]).all()
        return bool(pinned and keeps_all(limits_of(self.request, self.device, self.of_config(config)), 1)[0])

    def _choice(self, config: QuantConfig) -> NDArray[np.int16]:
        return np.array([self.space.formats.index(config[group[0]]) for group in self.space.groups], np.int16)


def _device_space(adapter: AdapterDescription, device: DeviceProfile) -> ConfigSpace:
    """Return the adapter's space with the formats that a device supports."""
    allowed = [fmt for fmt in adapter.formats if device.supports(fmt)]
    if not allowed:
        raise DeviceError(
            f"{device.id} supports none of the adapter's formats ({', '.join(map(str, adapter.formats))}); "
            "train an adapter on formats that it supports (coatrt devices lists them)"
        )
    return adapter.space.restrict(allowed)


def _described(
    config: QuantConfig, problem: _Problem, binds: str, steps: tuple[str, ...], archive: Archive | None
) -> Plan:
    """Return the plan of a configuration, with everything that is predicted of it."""
    device, workload, request, model = problem.device, problem.workload, problem.request, problem.space.model
    latency, prefill = problem.latency, None
    if latency is not None:
        tokens = request.batch * request.prefill
        prefill = latency.rest_seconds(model, workload, tokens, request.prefill)
        prefill += products_seconds(latency, model, config, tokens, request.batch)
    memory = memory_of(config, model, device, workload)
    measures = problem.of_config(config)
    per_token = sum(memory[name] for name in ("weights", "scales", "other tensors", "LoRA", "KV cache"))
    entry = archive.find(config) if archive is not None else None
    return Plan(
        device=device.id,
        request=request,
        binds=binds,
        config=config,
        average_bits=config.average_bits(model),
        memory_bytes=memory,
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
        adapter=problem.adapter.hash,
    )


def _front(problem: _Problem) -> tuple[tuple[int, float | None, float], ...]:
    """Return some of the candidates on the fronts of bytes and loss, and of seconds and loss, by bytes."""
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
    """Return the measured configuration to take instead of a picked one, or the picked one.

    A pick is rarely among the measured ones; the nearest in bytes within the limits stands for it.
    """
    model = problem.space.model
    sizes = {entry: entry.config.nbytes(model) for entry in archive if problem.allows(entry.config)}
    if not sizes:
        return config
    picked = config.nbytes(model)
    nearest = min(sizes, key=lambda entry: (abs(sizes[entry] - picked), entry.config != config))
    measured_best = min(sizes, key=lambda entry: (entry.loss, sizes[entry]))
    return measured_best.config if measured_best.loss < nearest.loss else config
