"""What a LoRA under training is worth on held-out data: the figure for early stopping, and the metrics at the end."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from coatrt.adapter.lora import CoaLora
from coatrt.configs.config import QuantConfig
from coatrt.data.task_data import TaskData
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import measure_held_out
from coatrt.planning.pareto import hypervolume
from coatrt.system.progress import Progress
from coatrt.training.config_sampler import TrainingSampler
from coatrt.training.options import TrainOptions

__all__ = ["HeldOut"]


@dataclass(frozen=True)
class HeldOut:
    """Measures configurations that a planner would choose for the budgets of the options.

    Args:
        model: the base; its configuration and LoRA are left as they happen to be.
        lora: as it stands when something is measured.
        sampler: chooses a configuration for a budget.
        data: its held-out examples are measured on.
        options: budgets, and how many examples.
        progress: called after each configuration of `evaluate`.
    """

    model: FakeQuantModel
    lora: CoaLora
    sampler: TrainingSampler
    data: TaskData
    options: TrainOptions
    progress: Progress

    @cached_property
    def configs(self) -> list[QuantConfig]:
        """The configuration of each budget."""
        return [self.sampler.plan_like(None, bits) for bits in self.options.budgets]

    def bits(self, config: QuantConfig) -> float:
        """Return the average bits per weight of a configuration."""
        return config.average_bits(self.sampler.space.model)

    @torch.no_grad()
    def measure(self, config: QuantConfig | None, adapted: bool) -> dict[str, float]:
        """Return the numbers of a configuration (None: full precision), with its LoRA or without."""
        self.model.set_config(config)
        self.model.set_pairs(self.lora.pairs(config) if adapted and config is not None else None)
        return measure_held_out(self.model, self.data, self.options.held_out_limit(self.data.kind))

    @cached_property
    def _full_precision(self) -> float:
        return self.measure(None, adapted=False)["loss"]

    def hypervolume(self) -> float:
        """Return the hypervolume of (bits, held-out loss) over the budgets.

        The reference point is the space's most bits and the loss of the full-precision model plus one nat.
        """
        points = [(self.bits(config), self.measure(config, adapted=True)["loss"]) for config in self.configs]
        return hypervolume(points, (self.sampler.space.max_bits, self._full_precision + 1))

    def evaluate(self) -> dict[str, Any]:
        """Return held-out losses: full precision, and per budget a configuration's without and with its LoRA.

        Where the task has an accuracy, it stands beside each loss, its key ending in "_accuracy".
        """
        rows, total = [], 1 + 2 * len(self.configs)
        full_precision = self._named("full_precision", None, adapted=False)
        self.progress(1, total, "held-out loss")
        for i, config in enumerate(self.configs):
            without = self._named("without", config, adapted=False)
            self.progress(2 * i + 2, total, "held-out loss")
            adapted = self._named("adapted", config, adapted=True)
            self.progress(2 * i + 3, total, "held-out loss")
            rows.append({"bits": self.bits(config), "configuration": config.hash, **without, **adapted})
        return {**full_precision, "budgets": rows}

    def _named(self, name: str, config: QuantConfig | None, adapted: bool) -> dict[str, float]:
        """Return the numbers of a configuration by keys: the loss by `name`, another number by `name`_key."""
        numbers = self.measure(config, adapted)
        return {name if key == "loss" else f"{name}_{key}": value for key, value in numbers.items()}
