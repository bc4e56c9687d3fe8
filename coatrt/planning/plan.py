"""A plan as data: the request, the configuration, and every figure it was chosen by."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from coatrt.configs.config import ConfigPatterns, QuantConfig
from coatrt.errors import ConfigError
from coatrt.models.matrices import ModelMatrices
from coatrt.system.json_data import convert, read_as, to_data

__all__ = ["LATENCY_MAX_LOSS", "Objective", "Plan", "PlanRequest", "read_choice"]

Objective = Literal["quality", "latency", "balanced"]

LATENCY_MAX_LOSS = 0.05
"""Largest predicted loss increase of "latency", in nats per token, where the request has no limit."""

_ENGINE = ("weights", "scales", "other tensors", "engine")
_BESIDE = ("LoRA", "KV cache", "activations", "runtime")
_MOST_FIGURE = 1e18
_MOST = {"memory": 2**60, "context": 2**31 - 1, "batch": 65536, "prefill": 2**31 - 1}
_AGAIN = "plan again (coatrt plan -o)"
_DERIVED = ("objective", "configuration_hash", "formats", "engine_bytes", "tokens_per_second", "configuration")
"""Keys of a plan's JSON that follow from the others."""


@dataclass(frozen=True)
class PlanRequest:
    """What a plan must achieve, and within which limits.

    Args:
        objective: "quality" takes the least predicted loss within the limits; "latency" the least predicted time per
            token; "balanced" the knee between the two: the least sum of both, each scaled to its range.
        memory: most bytes on the device; None for the device's memory.
        bits: most bits per weight on average.
        max_loss: largest predicted loss increase, nats per token; None for no limit, with "latency" for 0.05.
        min_tokens_per_second: least predicted decode speed of one sequence.
        context: slots of the KV cache per sequence.
        batch: sequences decoded together.
        prefill: most prompt tokens in one call.
        keep: (matrix name, kind or glob, format): pins, which fix the format of these matrices. The format "checkpoint"
            is that of a quantized checkpoint, whose own codes are used.

    Raises:
        ConfigError: an unknown objective, or a number out of range.
    """

    objective: Objective = "quality"
    memory: int | None = None
    bits: float | None = None
    max_loss: float | None = None
    min_tokens_per_second: float | None = None
    context: int = 2048
    batch: int = 1
    prefill: int = 512
    keep: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise ConfigError(f"objective must be one of {', '.join(get_args(Objective))}, got {self.objective!r}")
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ConfigError(f"{name} must be at least 1 and at most {most}, got {value}")
        for name, above in (("bits", 0), ("min_tokens_per_second", 1e-100)):
            value = getattr(self, name)
            if value is not None and not above < value < math.inf:
                raise ConfigError(f"{name} must be positive, got {value}")
        if self.max_loss is not None and not 0 <= self.max_loss < math.inf:
            raise ConfigError(f"max_loss must be at least 0, got {self.max_loss}")

    @property
    def loss_limit(self) -> float | None:
        """The largest predicted loss increase, with the default of "latency"."""
        if self.max_loss is None and self.objective == "latency":
            return LATENCY_MAX_LOSS
        return self.max_loss


@dataclass(frozen=True)
class Plan:
    """A configuration for a device, and why.

    Args:
        device: the device's id.
        request: objective and limits.
        binds: the limits that decided, in words.
        config: the configuration.
        average_bits: bits per weight, scales included.
        memory_bytes: bytes by purpose, see `coatrt.planning.memory.memory_of`.
        limit_bytes: most bytes in total, None if the device's memory is unknown.
        predicted_loss_increase: nats per token without adapter, second-order estimate from the empirical Fisher.
        bytes_per_token: bytes read to decode one token with a full cache.
        tokens_per_second_bound: bandwidth / bytes_per_token, None if the bandwidth is unknown.
        decode_seconds: predicted seconds per token of each sequence with a full cache, None if the speed is unknown.
        prefill_seconds: predicted seconds of a prompt of `request.prefill` tokens.
        latency_source: the source of these predictions.
        next_steps: options with another limit, and what they would change, in words.
        front: (total bytes, decode seconds or None, predicted loss increase) of the configurations on the front.
        measured_loss: held-out loss with the adapter, nats per token, if a search measured this configuration.
        adapter: hash of the adapter, empty if unknown.

    Raises:
        ConfigError: a figure out of range, or an unknown purpose of memory.
    """

    device: str
    request: PlanRequest
    binds: str
    config: QuantConfig
    average_bits: float
    memory_bytes: Mapping[str, int]
    limit_bytes: int | None
    predicted_loss_increase: float
    bytes_per_token: int
    tokens_per_second_bound: float | None
    decode_seconds: float | None = None
    prefill_seconds: float | None = None
    latency_source: str = ""
    next_steps: tuple[str, ...] = ()
    front: tuple[tuple[int, float | None, float], ...] = field(default=(), repr=False)
    measured_loss: float | None = None
    adapter: str = ""

    def __post_init__(self) -> None:
        if not set(_ENGINE) <= set(self.memory_bytes) <= {*_ENGINE, *_BESIDE}:
            raise ConfigError(
                f"memory_bytes must have {', '.join(_ENGINE)}, and may have {', '.join(_BESIDE)}; {_AGAIN}"
            )
        figures = [self.limit_bytes, abs(self.predicted_loss_increase), self.measured_loss, self.bytes_per_token]
        figures += [*self.memory_bytes.values(), *(figure for point in self.front for figure in point)]
        seconds = (self.decode_seconds, self.prefill_seconds, self.tokens_per_second_bound, self.average_bits)
        if not all(figure is None or 0 <= figure < _MOST_FIGURE for figure in figures) or not all(
            figure is None or 1 / _MOST_FIGURE < figure < _MOST_FIGURE for figure in seconds
        ):
            raise ConfigError(f"a figure of the plan is negative or beyond {_MOST_FIGURE:g}; {_AGAIN}")

    @property
    def objective(self) -> str:
        """The objective of the request."""
        return self.request.objective

    @property
    def total_bytes(self) -> int:
        """Total bytes."""
        return sum(self.memory_bytes.values())

    @property
    def engine_bytes(self) -> int:
        """Predicted bytes of the engine file."""
        return sum(self.memory_bytes[name] for name in _ENGINE)

    @property
    def tokens_per_second(self) -> float | None:
        """Predicted tokens per second of each sequence."""
        return 1 / self.decode_seconds if self.decode_seconds else None

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON, whose "configuration" is the content of a configuration file."""
        stored = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "config"}
        derived = (
            self.objective,
            self.config.hash,
            self.config.counts,
            self.engine_bytes,
            self.tokens_per_second,
            self.config.to_json(),
        )
        return dict(to_data({**stored, **dict(zip(_DERIVED, derived, strict=True))}))

    @classmethod
    def from_json(cls, value: Any, model: ModelMatrices, where: str = "the plan") -> "Plan":
        """Return the plan written by `to_json`; `where` names it in messages.

        Raises:
            ConfigError: the value is not a plan, is for another model, or its hash is not that of its configuration.
        """
        plan = convert(value, dict[str, Any], where, _AGAIN)
        config = ConfigPatterns.from_json(plan.get("configuration"), where).resolve(model)
        if config.hash != plan.get("configuration_hash"):
            raise ConfigError(
                f"{where} was altered: its configuration has the hash {config.hash}, got "
                f"{plan.get('configuration_hash')}; "
                f"{_AGAIN}"
            )
        request = convert(plan.get("request"), PlanRequest, f"{where}, request,", _AGAIN, exact=True)
        stored = {name: part for name, part in plan.items() if name not in _DERIVED}
        return convert({**stored, "config": config, "request": request}, cls, where, _AGAIN, exact=True)

    def text(self) -> str:
        """Return the plan as a few aligned lines."""
        lines = [
            f"device         {self.device}, objective {self.objective} ({self.binds})",
            f"configuration  {self.config.hash}: {self.average_bits:.3f} bits per weight: "
            + ", ".join(f"{count} × {text}" for text, count in self.config.counts.items()),
        ]
        lines += [f"{name:<14} {size / 2**20:10.1f} MiB" for name, size in self.memory_bytes.items()]
        limit = f" of {self.limit_bytes / 2**20:.1f}" if self.limit_bytes else ""
        lines.append(f"{'total':<14} {self.total_bytes / 2**20:10.1f} MiB{limit}")
        if self.device == "cpu":
            lines.append("valid for      --accuracy-level 4 (the default) and 1; level 0 decodes int8 and int4 at load")
        lines.append(f"predicted loss +{self.predicted_loss_increase:.4f} nats per token without LoRA (estimated)")
        if self.measured_loss is not None:
            lines.append(f"measured loss  {self.measured_loss:.4f} nats per token with LoRA (coatrt search)")
        if self.decode_seconds is not None and self.prefill_seconds is not None:
            lines.append(
                f"decode         {self.decode_seconds * 1e3:.3f} ms, {1 / self.decode_seconds:.0f} tokens/s with a "
                f"full cache; prefill of {self.request.prefill} tokens {self.prefill_seconds * 1e3:.2f} ms"
            )
            lines.append(f"predicted by   {self.latency_source}")
        bound = f"{self.tokens_per_second_bound:.0f} tokens/s" if self.tokens_per_second_bound else "unknown bandwidth"
        lines.append(f"decode, most   {bound}: memory bandwidth / {self.bytes_per_token / 1e6:.1f} MB read per token")
        lines += [f"next step      {step}" for step in self.next_steps]
        return "\n".join(lines)


def read_choice(path: str | Path, model: ModelMatrices) -> tuple[QuantConfig, Plan | None]:
    """Return the configuration in a file, and the plan where the file is the JSON of one.

    Raises:
        ConfigError: it is neither, or does not fit the model.
        FormatError: it names an unknown format.
    """
    value = read_as(path, object, "configuration", "give one, or a plan of coatrt plan -o")
    if isinstance(value, dict) and "configuration_hash" in value:
        plan = Plan.from_json(value, model, f"plan {path}")
        return plan.config, plan
    return ConfigPatterns.from_json(value, str(path)).resolve(model), None
