"""The Pareto search of an adapter: held-out loss with the LoRA it emits, kept in the adapter's directory."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from coatrt.adapter.adapter import Adapter
from coatrt.adapter.description import adapter_hash
from coatrt.configs.config import QuantConfig
from coatrt.data.documents import tokenize_text
from coatrt.data.examples import Examples
from coatrt.data.task_data import TaskData
from coatrt.errors import ConfigError
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import mean_loss
from coatrt.models.checkpoint import load_tokenizer
from coatrt.planning.archive import ARCHIVE_FILE, Archive
from coatrt.search.loop import SearchOptions, search
from coatrt.system.files import exclusive
from coatrt.system.progress import Progress, silent
from coatrt.system.resources import compute_device
from coatrt.system.tensors import hash_tensors

__all__ = ["search_adapter"]


def search_adapter(
    directory: str | Path,
    documents: Sequence[str] | TaskData,
    *,
    evaluations: int = 60,
    blocks: int = 8,
    length: int = 128,
    seed: int = 0,
    model: str | Path | None = None,
    compute: str = "cpu",
    progress: Progress = silent,
) -> tuple[Archive, SearchOptions]:
    """Measure configurations of an adapter, each with the LoRA that the hypernetwork emits for it.

    Args:
        directory: of the adapter; its archive.json is written after every measurement, and gone on with.
        documents: held-out texts, or the data of the task the adapter was trained on, whose held-out examples count.
        evaluations: configurations to measure, those in the archive counted.
        blocks: blocks of text (examples, questions) for each loss, spread over the documents.
        length: tokens per block of text.
        seed: of the proposals.
        model: where the adapter's model is now; by default where it was at training.
        compute: torch device.
        progress: called after each measurement.

    Returns:
        The archive, and the options with the reference point: most bits of the space, and the loss of a model that
        gives every token the same probability.

    Raises:
        CheckpointError: adapter or model cannot be read.
        ConfigError: the archive belongs to other text or another adapter, the adapter was trained on another task, an
            option is out of range, the device is not there, or another search of the adapter is running.
    """
    if blocks < 1:
        raise ConfigError(f"blocks {blocks} is given; give at least 1")
    compute_device(compute)
    directory = Path(directory)
    adapter = Adapter.load(directory)
    checkpoint = adapter.checkpoint(model)
    task, given = adapter.metrics.get("task", "text"), documents.kind if isinstance(documents, TaskData) else "text"
    if task != given:
        raise ConfigError(f"the adapter was trained on the task {task}, and {given} is given; give data of its task")
    if isinstance(documents, TaskData):
        examples = documents.held_out
    else:  # all of it is measured on: no text to train on is needed
        tokenizer = load_tokenizer(checkpoint.directory)
        examples = Examples.of_blocks(tokenize_text(tokenizer, documents, length, held_out=documents).held_out)
    picked = examples[torch.linspace(0, len(examples) - 1, min(blocks, len(examples))).round().long()]
    text = hash_tensors({"tokens": picked.tokens, "targets": picked.targets})[:16]
    space = adapter.space
    with exclusive(directory / ARCHIVE_FILE, "search of this adapter"):
        archive = Archive.open(directory / ARCHIVE_FILE, space.model.parameters, f"{adapter_hash(directory)} {text}")
        dtype = getattr(torch, adapter.metrics.get("options", {}).get("precision", "float32"))
        fake = FakeQuantModel(checkpoint, adapter.codes(checkpoint, progress), compute, dtype=dtype)
        lora = 2 * sum(rows * columns for rows, columns in adapter.contract.shapes.values())
        options = SearchOptions(
            evaluations,
            (space.max_bits + 8 * lora / space.model.parameters, math.log(int(checkpoint.config["vocab_size"]))),
            base=mean_loss(fake, picked),
            lora_bytes=lora,
            seed=seed,
        )

        def evaluate(config: QuantConfig) -> float:
            fake.set_config(config)
            fake.set_lora(adapter.contract, adapter.emit(config))
            return mean_loss(fake, picked)

        return search(space, adapter.sensitivity.costs, evaluate, options, archive, progress), options
