"""Plans: one configuration for one device, with every byte it needs and the bound on its speed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from coatrt.allocate import CostTable, allocate, cost_matrix
from coatrt.archive import Archive
from coatrt.config import QuantConfig
from coatrt.devices import DeviceProfile
from coatrt.errors import ConfigError, DeviceError
from coatrt.space import ConfigSpace

if TYPE_CHECKING:
    from coatrt.adapter import Adapter
    from coatrt.adapter_facts import AdapterFacts

__all__ = ["RUNTIME_RESERVE", "Objective", "Plan", "Workload", "make_plan", "plan_for"]

RUNTIME_RESERVE = 512 << 20
"""Bytes left to the CUDA context, the runtime and the display: an assumption, not a measurement."""

Objective = Literal["quality", "latency"]


@dataclass(frozen=True)
class Workload:
    """What the engine must hold beside its weights.

    Args:
        layers: decoder layers.
        kv_heads: key/value heads.
        head_dim: width of a head.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        vocabulary: rows of the head.
        context: slots of the KV cache per sequence.
        batch: sequences at once.
        prefill: most prompt tokens in one call.
        lora_parameters: elements of all A and B.
    """

    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    context: int
    batch: int
    prefill: int
    lora_parameters: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of the fp16 KV cache."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim * self.context * self.batch

    @property
    def lora_bytes(self) -> int:
        """Bytes of the LoRA tensors in fp16."""
        return 2 * self.lora_parameters

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations at prefill, fp16: residual and its copies, MLP, one row of logits per sequence."""
        return 2 * self.batch * (self.prefill * (6 * self.hidden + 3 * self.intermediate) + self.vocabulary)

    @classmethod
    def of(cls, config: Mapping[str, Any], context: int, batch: int, prefill: int, lora_parameters: int) -> "Workload":
        """Return the workload of a model given its config.json content.

        Raises:
            ConfigError: context, batch or prefill is not positive.
        """
        for name, value in (("context", context), ("batch", batch), ("prefill", prefill)):
            if value < 1:
                raise ConfigError(f"{name} {value} is given; give at least 1")
        heads = int(config["num_attention_heads"])
        return cls(
            layers=int(config["num_hidden_layers"]),
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            context=context,
            batch=batch,
            prefill=prefill,
            lora_parameters=lora_parameters,
        )


@dataclass(frozen=True)
class Plan:
    """A configuration for a device, and why.

    Args:
        device: the device's id.
        objective: what was optimised.
        binds: the bound that decided.
        config: the configuration.
        average_bits: bits per weight, scales included.
        memory: bytes by purpose: weights, other tensors, LoRA, KV cache, activations, runtime reserve.
        limit_bytes: bytes the plan was allowed in all, None where the device's memory is unknown.
        predicted_loss_increase: nats per token without adapter, second-order estimate from the empirical Fisher.
        bytes_per_token: bytes read to decode one token with a full cache.
        tokens_per_second_bound: bandwidth / bytes_per_token, None where the bandwidth is unknown.
        measured_loss: held-out loss with the adapter, nats per token, where the search measured this configuration.
    """

    device: str
    objective: str
    binds: str
    config: QuantConfig
    average_bits: float
    memory: Mapping[str, int]
    limit_bytes: int | None
    predicted_loss_increase: float
    bytes_per_token: int
    tokens_per_second_bound: float | None
    measured_loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON form; its "configuration" is a configuration file of its own."""
        return {
            "device": self.device,
            "objective": self.objective,
            "binds": self.binds,
            "configuration_hash": self.config.hash,
            "average_bits": self.average_bits,
            "formats": dict(self.config.counts),
            "memory_bytes": dict(self.memory),
            "limit_bytes": self.limit_bytes,
            "predicted_loss_increase": self.predicted_loss_increase,
            "measured_loss": self.measured_loss,
            "bytes_per_token": self.bytes_per_token,
            "tokens_per_second_bound": self.tokens_per_second_bound,
            "configuration": self.config.to_json(),
        }

    def text(self) -> str:
        """Return the plan as a few aligned lines."""
        lines = [
            f"device         {self.device}, objective {self.objective} ({self.binds})",
            f"configuration  {self.config.hash}: {self.average_bits:.3f} bits per weight: "
            + ", ".join(f"{count} × {text}" for text, count in self.config.counts.items()),
        ]
        lines += [f"{name:<14} {size / 2**20:10.1f} MiB" for name, size in self.memory.items()]
        limit = f" of {self.limit_bytes / 2**20:.1f}" if self.limit_bytes else ""
        lines.append(f"{'total':<14} {sum(self.memory.values()) / 2**20:10.1f} MiB{limit}")
        lines.append(
            f"predicted loss +{self.predicted_loss_increase:.4f} nats per token before the adapter (Fisher estimate)"
        )
        if self.measured_loss is not None:
            lines.append(f"measured loss  {self.measured_loss:.4f} nats per token with the adapter (coatrt search)")
        bound = f"{self.tokens_per_second_bound:.0f} tokens/s" if self.tokens_per_second_bound else "unknown bandwidth"
        lines.append(f"decode bound   {bound} ({self.bytes_per_token / 1e6:.1f} MB read per token)")
        if any(fmt.is_normal_float for fmt in self.config.formats.values()):
            lines.append("note           NormalFloat saves memory; what a GPU pays to unpack it is not measured yet")
        return "\n".join(lines)


def make_plan(
    space: ConfigSpace,
    costs: CostTable,
    device: DeviceProfile,
    workload: Workload,
    *,
    objective: Objective = "quality",
    memory: int | None = None,
    bits: float | None = None,
    max_loss: float = 0.05,
    archive: Archive | None = None,
) -> Plan:
    """Return the plan of least predicted loss that fits, or of least bytes within a predicted loss.

    Args:
        space: the adapter's space; formats the device lacks are left out.
        costs: predicted loss increase by matrix and format.
        device: the target.
        workload: KV cache, LoRA and activations to leave room for.
        objective: "quality" spends the budget on the least predicted loss; "latency" takes the fewest bytes (decoding
            is bound by bytes read) whose predicted loss increase is at most `max_loss`.
        memory: bytes the engine may use on the device; the device's memory if not given.
        bits: cap on average bits per weight.
        max_loss: for "latency": nats per token.
        archive: measured configurations. For "quality", the measured one of least loss that fits is taken where the
            measured one nearest to the allocation in bytes lost more.

    Raises:
        DeviceError: the device allows none of the space's formats.
        ConfigError: nothing fits; the message says what would.
    """
    allowed = [fmt for fmt in space.formats if device.supports(fmt)]
    if not allowed:
        raise DeviceError(
            f"{device.id} supports none of the adapter's formats ({', '.join(map(str, space.formats))}); "
            "train an adapter on formats it has (coatrt devices)"
        )
    space = space.restrict(allowed)
    limit = memory if memory is not None else device.memory_bytes
    fixed = {
        "other tensors": space.model.other_bytes,
        "LoRA": workload.lora_bytes,
        "KV cache": workload.kv_bytes,
        "activations": workload.activation_bytes,
        "runtime": RUNTIME_RESERVE,
    }
    most = float(space.sizes.max(1).sum())
    room = most if limit is None else float(limit - sum(fixed.values()))
    if room < space.sizes.min(1).sum():
        need = int(space.sizes.min(1).sum()) + sum(fixed.values())
        raise ConfigError(
            f"{device.id} with {(limit or 0) / 2**20:.0f} MiB cannot hold the model; it needs {need / 2**20:.0f} "
            f"MiB at least (KV cache {workload.kv_bytes / 2**20:.0f}, runtime {RUNTIME_RESERVE / 2**20:.0f}); "
            "raise --memory, lower --context or --batch, or train with smaller formats"
        )
    capped = bits * space.model.parameters / 8 if bits is not None else most
    budget = min(room, capped, most)
    if budget < space.sizes.min(1).sum():
        raise ConfigError(f"--bits {bits} is below what the formats allow; the least here is {space.min_bits:.3f}")
    if objective == "quality":
        config = _better_measured(allocate(space, costs, max_bytes=budget), archive, space, budget)
        binds = (
            "memory" if budget == room < most else f"--bits {bits:g}" if budget == capped < most else "nothing binds"
        )
    else:
        config = allocate(space, costs, max_cost=max_loss)
        binds = f"predicted loss ≤ {max_loss:g}"
        if config.nbytes(space.model) > budget:
            raise ConfigError(
                f"a predicted loss of {max_loss:g} needs {config.nbytes(space.model) / 2**20:.1f} MiB of weights, and "
                f"{budget / 2**20:.1f} are free; raise --max-loss or --memory, or take --objective quality"
            )
    prices, columns = cost_matrix(space, costs), {fmt: i for i, fmt in enumerate(space.formats)}
    loss = sum(prices[i, columns[config[group[0]]]] for i, group in enumerate(space.groups))
    weights = config.nbytes(space.model)
    measured = archive.find(config) if archive is not None else None
    per_token = weights + fixed["other tensors"] + fixed["LoRA"] + fixed["KV cache"]
    return Plan(
        device=device.id,
        objective=objective,
        binds=binds,
        config=config,
        average_bits=config.average_bits(space.model),
        memory={"weights": weights, **fixed},
        limit_bytes=limit,
        predicted_loss_increase=float(loss),
        bytes_per_token=per_token,
        tokens_per_second_bound=device.bandwidth / per_token if device.bandwidth else None,
        measured_loss=measured.loss if measured is not None else None,
    )


def _better_measured(
    config: QuantConfig, archive: Archive | None, space: ConfigSpace, budget: float
) -> QuantConfig:  # fmt: skip
    """Return the measured configuration to take in place of an allocated one, or the allocated one.

    An allocation is hardly ever among the measured ones; the nearest in bytes that fits stands for it.
    """
    sizes = {} if archive is None else {
        entry: size for entry in archive.current()
        if space.contains(entry.config) and (size := entry.config.nbytes(space.model)) <= budget
    }  # fmt: skip
    if not sizes:
        return config
    wanted = config.nbytes(space.model)
    nearest = min(sizes, key=lambda entry: (abs(sizes[entry] - wanted), entry.config != config))
    best = min(sizes, key=lambda entry: (entry.loss, sizes[entry]))
    return best.config if best.loss < nearest.loss else config


def plan_for(
    adapter: "Adapter | AdapterFacts",
    device: DeviceProfile,
    *,
    objective: Objective = "quality",
    memory: int | None = None,
    bits: float | None = None,
    max_loss: float = 0.05,
    context: int = 2048,
    batch: int = 1,
    prefill: int = 512,
    archive: Archive | None = None,
) -> Plan:
    """Return the plan of an adapter for a device.

    Args:
        adapter: gives the space, the sensitivities and the size of the LoRA.
        device: the target.
        objective: see `make_plan`.
        memory: see `make_plan`.
        bits: see `make_plan`.
        max_loss: see `make_plan`.
        context: slots of the KV cache per sequence.
        batch: sequences at once.
        prefill: most prompt tokens in one call.
        archive: see `make_plan`.

    Raises:
        DeviceError: the device allows none of the adapter's formats.
        ConfigError: nothing fits, or an option is out of range.
    """
    lora = sum(rows * columns for rows, columns in adapter.contract.shapes.values())
    workload = Workload.of(adapter.model_config, context, batch, prefill, lora)
    return make_plan(
        adapter.space, adapter.sensitivity.costs, device, workload,
        objective=objective, memory=memory, bits=bits, max_loss=max_loss, archive=archive,
    )  # fmt: skip
