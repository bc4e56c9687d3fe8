"""Held-out losses of an adapter's model: each example's against torch, and their mean against `measure`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from coatrt.adapter.adapter import Adapter, Evaluator
from coatrt.configs.config import QuantConfig
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.modules import load_model
from support.tiny import text_data


def test_the_losses_of_examples_are_those_of_torch_and_their_mean_is_measured(
    tiny_llama: Path, tiny_adapter: Path
) -> None:
    adapter, data = Adapter.from_pretrained(tiny_adapter), text_data(tiny_llama)
    data = replace(data, held_out=data.held_out[:5])
    evaluator = Evaluator(adapter)
    model = load_model(Checkpoint.open(tiny_llama), torch.float32)
    with torch.no_grad():
        expected = [
            functional.cross_entropy(model(input_ids=row[None, :-1]).logits[0], row[1:]).item()
            for row in data.held_out.tokens
        ]
    found = evaluator.example_losses(None, data)
    assert found == pytest.approx(expected, abs=1e-4)
    config = QuantConfig.uniform(adapter.description.model, "nf3-g32")
    losses = evaluator.example_losses(config, data, adapter.emit(config))
    weights = data.held_out.counts.numpy()
    assert evaluator.measure(config, data, adapter.emit(config))["loss"] == pytest.approx(
        float(np.average(losses, weights=weights)), abs=1e-5
    )
    assert np.abs(losses - found).max() > 1e-3
