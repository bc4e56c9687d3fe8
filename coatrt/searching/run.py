"""The Pareto search of an adapter: held-out losses with the emitted LoRA, archived in the adapter's directory."""

import math
from dataclasses import replace
from pathlib import Path

import torch

from coatrt.adapter.adapter import Adapter, Evaluator
from coatrt.configs.config import QuantConfig
from coatrt.data.task_data import TaskData
from coatrt.errors import ConfigError
from coatrt.planning.archive import ARCHIVE_FILE, Archive
from coatrt.searching.loop import extend_archive
from coatrt.system.exclusive import exclusive
from coatrt.system.progress import Progress, silent

__all__ = ["search"]


def search(
    directory: str | Path,
    data: TaskData,
    *,
    evaluations: int = 60,
    blocks: int = 8,
    model: str | Path | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> tuple[Archive, tuple[float, float]]:
    """Measure configurations of an adapter, each with its emitted LoRA.

    Args:
        directory: the adapter; its archive.json is saved after every measurement, and an existing one is resumed.
        data: data of the adapter's task, with the held-out examples to measure on.
        evaluations: configurations to measure, including those in the archive.
        blocks: held-out blocks of text (examples, questions) for each loss, spread evenly over all.
        model: current path or hub name of the model; by default that of training.
        device: torch device, such as "cpu" or "cuda".
        progress: called after each measurement.

    Returns:
        The archive, and the reference point of its hypervolume: maximum bits of the space with the LoRA, and the loss
        of a model that gives every token the same probability.

    Raises:
        CheckpointError: the adapter or its model cannot be read.
        ConfigError: the archive is of other text or another adapter, the adapter was trained on another task, an option
            is out of range, there is no such device, or another search or training of the adapter is running.
    """
    if blocks < 1:
        raise ConfigError(f"blocks must be at least 1, got {blocks}")
    if not Path(directory).is_dir():
        Adapter.from_pretrained(directory)  # raises an error that says what is wrong
    with exclusive(directory):
        return _search(Path(directory), data, evaluations, blocks, model, device, progress)


def _search(
    directory: Path,
    data: TaskData,
    evaluations: int,
    blocks: int,
    model: str | Path | None,
    device: str,
    progress: Progress,
) -> tuple[Archive, tuple[float, float]]:
    adapter = Adapter.from_pretrained(directory)
    description = adapter.description
    task, examples = description.metrics["task"], data.held_out
    if task != data.kind:
        raise ConfigError(f"the data must be of the adapter's task, {task}, got {data.kind}")
    data.check_rows(description.model.matrices[0].N)
    sample = examples[torch.linspace(0, len(examples) - 1, min(blocks, len(examples))).round().long()]
    space, lora = description.space, 2 * description.lora_parameters
    identity = f"{description.hash} {sample.digest[:16]}"
    archive = Archive.open(directory / ARCHIVE_FILE, space.model.parameters, identity)
    evaluator = Evaluator(adapter, model=model, device=device, progress=progress)
    measured_on = replace(data, held_out=sample, choices=None)

    def evaluate(config: QuantConfig) -> float:
        return evaluator.measure(config, measured_on, adapter.emit(config))["loss"]

    costs = description.sensitivity.costs
    extend_archive(space, costs, evaluate, evaluations, archive, lora_bytes=lora, progress=progress)
    return archive, (space.max_bits + 8 * lora / space.model.parameters, math.log(description.spec.vocabulary))
