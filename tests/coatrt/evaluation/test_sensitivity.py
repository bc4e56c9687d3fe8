"""Sensitivities against the Fisher information of single blocks."""

from pathlib import Path

import pytest
import torch

from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.sensitivity import measure_sensitivity
from coatrt.models.checkpoint import Checkpoint, load_model
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode, encode
from coatrt.quantization.weight_format import WeightFormat


def test_cost_is_the_empirical_fisher_of_single_blocks(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    codes = CodeStore(checkpoint)
    blocks = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(0))
    formats = [WeightFormat.parse(text) for text in ("nf2-g32", "int8")]
    found = measure_sensitivity(FakeQuantModel(checkpoint, codes), codes, blocks, formats)
    model = load_model(checkpoint)
    for name in ("model.embed_tokens", "model.layers.1.mlp.down_proj"):
        weight = model.get_submodule(name).weight
        fisher = torch.zeros_like(weight)
        for block in blocks:
            loss = model(input_ids=block[None], labels=block[None]).loss
            (grad,) = torch.autograd.grad(loss, weight)
            fisher += 16 * grad.square() / 3  # 16 predicted tokens
        for fmt in formats:
            residual = weight.detach() - decode(encode(weight.detach(), fmt))
            cost = 0.5 * (fisher * residual.square()).sum().item()
            assert found.costs[name][str(fmt)] == pytest.approx(cost, rel=1e-3)
            error = (residual.norm() / weight.norm()).item()
            assert found.errors[name][str(fmt)] == pytest.approx(error, rel=1e-4)
    assert set(found.costs) == set(checkpoint.matrices.names)
