"""A base in bfloat16: its weights and products, and what stays float32 beside it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from coatrt.configs.lora_contract import contract_for
from coatrt.configs.space import ConfigSpace
from coatrt.data.examples import Examples
from coatrt.evaluation.curvature import measure_sensitivity, output_gains
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.modules import load_model
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode, encode
from coatrt.quantization.weight_format import WeightFormat
from coatrt.training.run import train
from support.tiny import text_data, tiny_options

FORMATS = [WeightFormat.parse(text) for text in ("nf2-g32", "int8")]
TOKENS = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(0))
EXAMPLES = Examples.of_blocks(TOKENS)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path) -> Checkpoint:
    return Checkpoint.open(tiny_llama)


@pytest.fixture
def half(checkpoint: Checkpoint) -> FakeQuantModel:
    return FakeQuantModel(checkpoint, CodeStore(checkpoint), dtype=torch.bfloat16)


def test_a_bfloat16_base_is_transformers_own_with_decoded_weights(checkpoint: Checkpoint, half: FakeQuantModel) -> None:
    theirs = load_model(checkpoint, torch.bfloat16)
    assert torch.equal(half.logits(TOKENS), theirs(input_ids=TOKENS).logits)
    half.set_config(ConfigSpace(checkpoint.matrices, FORMATS[1:]).uniform("int8"))
    for name in checkpoint.matrices.names:
        theirs.get_submodule(name).weight.data = decode(encode(checkpoint.tensor(f"{name}.weight").float(), "int8")).to(
            torch.bfloat16
        )
    assert torch.equal(half.logits(TOKENS), theirs(input_ids=TOKENS).logits)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    exact = decode(encode(checkpoint.tensor("model.layers.0.mlp.up_proj.weight").float(), "int8"))
    assert torch.equal(half.weight("model.layers.0.mlp.up_proj", FORMATS[1]), exact)
    assert torch.equal(half.weight("model.layers.0.mlp.up_proj", FORMATS[1], exact=False), exact.bfloat16())


def test_a_float32_lora_beside_it_gets_float32_gradients(checkpoint: Checkpoint, half: FakeQuantModel) -> None:
    whole = FakeQuantModel(checkpoint, CodeStore(checkpoint))
    generator = torch.Generator().manual_seed(1)
    pairs = {
        t.matrix: (
            torch.randn(t.K, t.rank, generator=generator) / t.K**0.5,
            0.05 * torch.randn(t.rank, t.N, generator=generator),
        )
        for t in contract_for(checkpoint.matrices, 16, 32).tensors
    }
    gradients = []
    for model in (half, whole):
        leaves = {name: tuple(x.clone().requires_grad_() for x in pair) for name, pair in pairs.items()}
        model.set_pairs(leaves)  # type: ignore[arg-type]
        model.loss(EXAMPLES).backward()  # type: ignore[no-untyped-call]
        gradients.append([x.grad for pair in leaves.values() for x in pair])
    assert all(x is not None and x.dtype == torch.float32 for x in gradients[0])
    flat = [torch.cat([x.flatten() for x in found]) for found in gradients]
    assert torch.cosine_similarity(flat[0], flat[1], dim=0) > 0.999
    assert flat[0].norm() == pytest.approx(float(flat[1].norm()), rel=0.02)


def test_sensitivities_are_those_of_float32(checkpoint: Checkpoint, half: FakeQuantModel) -> None:
    codes = CodeStore(checkpoint)
    whole = FakeQuantModel(checkpoint, codes)
    found, wanted = (measure_sensitivity(model, codes, EXAMPLES, FORMATS) for model in (half, whole))
    assert found.errors == wanted.errors  # of the exact weights
    for name in checkpoint.matrices.names:
        for fmt in map(str, FORMATS):
            assert found.costs[name][fmt] == pytest.approx(wanted.costs[name][fmt], rel=0.05)
    gains = [output_gains(model, EXAMPLES) for model in (half, whole)]
    for name, gain in gains[0].items():
        assert gain.dtype == torch.float32
        assert float(gain.sum()) == pytest.approx(float(gains[1][name].sum()), rel=0.03)


def test_training_learns_as_float32_does(tiny_llama: Path, tmp_path: Path) -> None:
    found = {}
    for precision in ("float32", "bfloat16"):
        options = tiny_options(preset="none", precision=precision, learning_rate=2e-3)
        found[precision] = train(tiny_llama, text_data(tiny_llama), tmp_path / precision, options)
    for name in ("losses", "held_out"):
        half, whole = (found[precision].description.metrics[name] for precision in ("bfloat16", "float32"))
        if name == "held_out":
            half, whole = ([x["full_precision"], *(row["adapted"] for row in x["budgets"])] for x in (half, whole))
        assert half != whole
        np.testing.assert_allclose(np.array(half), np.array(whole), rtol=5e-3)
    for precision in found:
        assert {p.dtype for p in found[precision].lora.parameters()} == {torch.float32}
