"""Held-out losses of a trained LoRA, for the metrics of its adapter."""

from typing import Any

import torch

from coatrt.adapter.lora import CoaLora
from coatrt.configs.config import QuantConfig
from coatrt.data.task_data import TaskData
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import measure_held_out
from coatrt.system.progress import Progress
from coatrt.training.config_sampler import TrainingSampler
from coatrt.training.options import TrainOptions

__all__ = ["measure_budgets"]


@torch.no_grad()
def measure_budgets(
    model: FakeQuantModel,
    lora: CoaLora,
    sampler: TrainingSampler,
    data: TaskData,
    options: TrainOptions,
    progress: Progress,
) -> dict[str, Any]:
    """Return held-out losses: of full precision, and per budget of a configuration without and with its LoRA.

    If the task has an accuracy, each loss has one beside it under a key that ends in "_accuracy".

    Args:
        model: the base model; its configuration and LoRA are changed.
        lora: the trained LoRA.
        sampler: provides the configuration of a budget, as a planner would choose it.
        data: data with the held-out examples.
        options: budgets and number of examples.
        progress: called after each measurement.
    """
    budgets = options.measured_budgets(sampler.space.min_bits, sampler.space.max_bits)
    count, total = 0, 1 + 2 * len(budgets)

    def measure(name: str, config: QuantConfig | None, adapted: bool = False) -> dict[str, float]:
        nonlocal count
        model.set_config(config)
        model.set_pairs(lora.pairs(config) if adapted and config is not None else None)
        numbers = measure_held_out(model, data, options.held_out_limit(data.kind))
        count += 1
        progress(count, total, "held-out loss")
        return {name if key == "loss" else f"{name}_{key}": value for key, value in numbers.items()}

    full_precision, rows = measure("full_precision", None), []
    for bits in budgets:
        config = sampler.plan_like(None, bits)
        numbers = {**measure("without", config), **measure("adapted", config, adapted=True)}
        rows.append({"bits": config.average_bits(sampler.space.model), "configuration": config.hash, **numbers})
    return {**full_precision, "budgets": rows}
