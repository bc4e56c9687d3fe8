"""The optimisation loop: every step draws new configurations; an interrupted run resumes exactly."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coatrt.configs.config import QuantConfig
from coatrt.data.documents import batches
from coatrt.data.examples import Examples
from coatrt.errors import CoatError
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.system.distributed import Processes
from coatrt.system.progress import Progress, silent
from coatrt.training.objective import Pass, Trainable, accumulate_gradients
from coatrt.training.options import TrainOptions
from coatrt.training.resume_state import History, load_state, save_state

__all__ = ["optimise"]

_MAX_NORM = 1.0  # of the gradient


def optimise(
    model: FakeQuantModel,
    lora: Trainable,
    data: Examples,
    draw: Callable[[int], Sequence[QuantConfig]],
    options: TrainOptions,
    state: Path,
    run: str,
    processes: Processes,
    progress: Progress = silent,
    gradients: Callable[[FakeQuantModel, Any, Sequence[Pass], int], Tensor] = accumulate_gradients,
    stage: str = "training",
) -> History:
    """Train a LoRA module, or another with its own gradients, resuming from its last checkpoint if there is one.

    Args:
        model: the frozen base model.
        lora: module, trained in place.
        data: examples to train on.
        draw: step → its configurations.
        options: steps, learning rates, batch and so on.
        state: directory of checkpoints.
        run: identity of model, data and options; a checkpoint of another run is refused.
        processes: data-parallel processes, each with its share of every batch.
        progress: called after each step.
        gradients: adds the gradients of a step and returns its losses, see `accumulate_gradients`.
        stage: name of the stage in progress reports.

    Raises:
        CoatError: the loss is not finite.
        ConfigError: a checkpoint of another run, or a batch that is not a multiple of the processes.
        CheckpointError: a checkpoint is damaged.
    """
    members = lora.parameter_groups()
    groups = [
        {"params": parameters_of_group, "peak": options.rates[name]} for name, parameters_of_group in members.items()
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)  # rates are set in each step
    parameters = [parameter for parameters_of_group in members.values() for parameter in parameters_of_group]
    history = load_state(state, lora, optimizer, run) or History()
    start = time.monotonic() - history.seconds
    while history.step < options.steps:
        passes = _passes(data, draw(history.step), options, history.step, processes)
        local_losses = gradients(model, lora, passes, options.accumulate)
        processes.sum_gradients(parameters)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * options.rate(history.step)
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses = processes.sum(local_losses)  # the only wait for a GPU in a step, after all its work is queued
        if not all(map(math.isfinite, losses)):
            raise CoatError(
                f"the loss is not finite at step {history.step + 1}; try a lower --learning-rate or a higher --low-bits"
            )
        history.step += 1
        history.losses.append(losses)
        progress(history.step, options.steps, stage, f"loss {sum(losses) / len(losses):.3f}")
        is_due = history.step == options.steps or history.step % options.checkpoint_every == 0
        if is_due and processes.is_first:
            history.seconds = time.monotonic() - start
            save_state(state, lora, optimizer, run, history)
    processes.wait()
    history.seconds = time.monotonic() - start
    return history


def _passes(
    data: Examples, configs: Sequence[QuantConfig], options: TrainOptions, step: int, processes: Processes
) -> list[Pass]:
    """Return the configurations of a step with this process's rows for each."""
    rows = batches(len(data), len(configs) * options.batch, step, options.seed).chunk(len(configs))
    passes = []
    for config, own in zip(configs, rows, strict=True):
        batch = data[own]
        mine = batch[processes.share(torch.arange(len(batch)))].trimmed()
        passes.append(Pass(config, mine, batch.target_count))
    return passes
