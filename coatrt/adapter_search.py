"""The Pareto search of an adapter: held-out loss with the LoRA it emits, kept in the adapter's directory."""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from coatrt.adapter import Adapter
from coatrt.adapter_facts import adapter_hash
from coatrt.archive import ARCHIVE_FILE, Archive, ArchiveEntry
from coatrt.checkpoint import load_tokenizer
from coatrt.config import QuantConfig
from coatrt.data import tokenize_text
from coatrt.errors import ConfigError
from coatrt.evaluate import mean_loss
from coatrt.fakequant import FakeQuantModel
from coatrt.machine import compute_device
from coatrt.search import SearchOptions, search

__all__ = ["search_adapter"]

Progress = Callable[[int, int, ArchiveEntry], None]


def search_adapter(
    directory: str | Path,
    documents: Sequence[str],
    *,
    evaluations: int = 60,
    blocks: int = 8,
    length: int = 128,
    seed: int = 0,
    model: str | Path | None = None,
    compute: str = "cpu",
    progress: Progress | None = None,
) -> tuple[Archive, SearchOptions]:
    """Measure configurations of an adapter, each with the LoRA that the hypernetwork emits for it.

    Args:
        directory: of the adapter; its archive.json is written after every measurement, and gone on with.
        documents: held-out texts.
        evaluations: configurations to measure, those in the archive counted.
        blocks: blocks of text for each loss, spread over the documents.
        length: tokens per block.
        seed: of the proposals.
        model: where the adapter's model is now; by default where it was at training.
        compute: torch device.
        progress: called after each measurement.

    Returns:
        The archive, and the options with the reference point: most bits of the space, and the loss of a model that
        gives every token the same probability.

    Raises:
        CheckpointError: adapter or model cannot be read.
        ConfigError: the archive belongs to other text or another adapter, an option is out of range, or the device is
            not there.
    """
    if blocks < 1:
        raise ConfigError(f"blocks {blocks} is given; give at least 1")
    compute_device(compute)
    directory = Path(directory)
    adapter = Adapter.load(directory)
    checkpoint = adapter.checkpoint(model)
    # All of it is measured on: no text to train on is needed.
    tokens = tokenize_text(load_tokenizer(checkpoint.directory), documents, length, held_out=documents).held_out
    picked = tokens[torch.linspace(0, len(tokens) - 1, min(blocks, len(tokens))).round().long()]
    text = hashlib.sha256(picked.numpy().tobytes()).hexdigest()[:16]
    space = adapter.space
    archive = Archive.open(directory / ARCHIVE_FILE, space.model.parameters, f"{adapter_hash(directory)} {text}")
    fake = FakeQuantModel(checkpoint, adapter.codes(checkpoint), compute)
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
