"""What a trained LoRA is worth on held-out data: the metrics of an adapter."""

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
    """Return held-out losses: full precision, and per budget a configuration's without and with its LoRA.

    Where the task has an accuracy, it stands beside each loss, its key ending in "_accuracy".

    Args:
        model: the base; its configuration and LoRA are left as they happen to be.
        lora: as trained.
        sampler: gives the configuration that a planner would choose for a budget.
        data: its held-out examples are measured on.
        options: budgets, and how many examples.
        progress: called after each measurement.
    """
    done, total = 0, 1 + 2 * len(options.budgets)

    def measure(name: str, config: QuantConfig | None, adapted: bool = False) -> dict[str, float]:
        nonlocal done
        model.set_config(config)
        model.set_pairs(lora.pairs(config) if adapted and config is not None else None)
        numbers = measure_held_out(model, data, options.held_out_limit(data.kind))
        done += 1
        progress(done, total, "held-out loss")
        return {name if key == "loss" else f"{name}_{key}": value for key, value in numbers.items()}

    full_precision, rows = measure("full_precision", None), []
    for bits in options.budgets:
        config = sampler.plan_like(None, bits)
        numbers = {**measure("without", config), **measure("adapted", config, adapted=True)}
        rows.append({"bits": config.average_bits(sampler.space.model), "configuration": config.hash, **numbers})
    return {**full_precision, "budgets": rows}
