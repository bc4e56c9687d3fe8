"""A model whose weights stand for any configuration: its logits, and the decoded weights it keeps."""

from pathlib import Path

import numpy as np
import pytest
import torch

from coatrt.configs.config import QuantConfig
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.modules import load_model
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode, encode
from coatrt.quantization.weight_format import WeightFormat


def test_fake_quantized_logits_are_those_of_decoded_weights(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    ours, theirs = FakeQuantModel(checkpoint, CodeStore(checkpoint)), load_model(checkpoint)
    tokens = torch.arange(24).view(2, 12)
    plain = theirs(input_ids=tokens).logits
    config = QuantConfig(
        {n: WeightFormat.parse(("nf3-g32", "int8")[i % 2]) for i, n in enumerate(checkpoint.matrices.names)}
    )
    ours.set_config(QuantConfig.uniform(checkpoint.matrices, "nf4-g32"))
    ours.set_config(config)
    for name in checkpoint.matrices.names:
        weight = theirs.get_submodule(name).weight
        weight.data = decode(encode(weight.data, config[name]))
    assert torch.equal(ours.logits(tokens), theirs(input_ids=tokens).logits)
    ours.set_config(None)
    assert torch.equal(ours.logits(tokens), plain)


def test_decoded_weights_are_kept_within_a_bound(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    tokens, rng = torch.arange(24).view(2, 12), np.random.default_rng(0)
    texts = ("nf3-g32", "int8", "fp8")
    configs = [
        QuantConfig({name: WeightFormat.parse(str(rng.choice(texts))) for name in checkpoint.matrices.names})
        for _ in range(4)
    ]
    size = 4 * checkpoint.matrices.parameters
    for limit in (0, size // 2, 10 * size):
        model = FakeQuantModel(checkpoint, CodeStore(checkpoint), decoded_bytes=limit)
        for config in (*configs, None, *configs):
            model.set_config(config)
            for name in checkpoint.matrices.names:
                plain = checkpoint.tensor(f"{name}.weight")
                expected = plain if config is None else decode(encode(plain, config[name]))
                weight = model.model.get_submodule(name).weight
                assert torch.equal(weight, expected)
            assert model.logits(tokens).isfinite().all()
        held = sum(value.nbytes for value in model._decoded.values())
        assert held == model._bytes <= limit
        assert bool(held) == bool(limit)


def test_decoded_weights_take_no_more_of_a_gpu_that_is_short_of_memory(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    model = FakeQuantModel(checkpoint, CodeStore(checkpoint))
    model.set_config(QuantConfig.uniform(checkpoint.matrices, "int8"))
    held = model._bytes
    assert held == 4 * checkpoint.matrices.parameters
    monkeypatch.setattr("coatrt.evaluation.fake_quant._is_memory_low", lambda device: True)
    for text in ("fp8", "nf4-g32"):
        model.set_config(QuantConfig.uniform(checkpoint.matrices, text))
        assert model._bytes <= held
        for name in checkpoint.matrices.names:
            expected = decode(encode(checkpoint.tensor(f"{name}.weight"), text))
            assert torch.equal(model.model.get_submodule(name).weight, expected)


def test_weights_from_elsewhere_stay_until_a_format_is_set(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    model, name = FakeQuantModel(checkpoint, CodeStore(checkpoint)), "model.layers.0.mlp.up_proj"
    tokens, weight = torch.arange(12)[None], checkpoint.tensor("model.layers.0.mlp.up_proj.weight")
    plain = model.logits(tokens)
    model.set_weights([(name, torch.zeros_like(weight))])
    assert not torch.allclose(model.logits(tokens), plain, atol=1e-3)
    model.set_config(None)
    assert torch.equal(model.logits(tokens), plain)
