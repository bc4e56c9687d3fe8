"""What a bundle is worth on held-out data, against transformers and against the adapter's own numbers."""

from pathlib import Path

import pytest
import torch

from coatrt.adapter.adapter import Adapter, Evaluator
from coatrt.bundle import Bundle
from coatrt.engines.bundles.quality import measure_quality, sampled
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.errors import CheckpointError, ConfigError
from coatrt.reporting.measured import find_quality, save_quality
from support.tiny import save_tiny_llama, text_data


def test_a_bundle_measures_as_its_adapter_does(tiny_bundle: Path, tiny_adapter: Path, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    bundle, adapter = Bundle.open(tiny_bundle), Adapter.from_pretrained(tiny_adapter)
    data = sampled(text_data(tiny_llama), 5)
    assert len(data.held_out) == 5
    seen = []
    quality = measure_quality(bundle, data, progress=lambda *step: seen.append(step[:2]))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        expected = float(model(input_ids=data.held_out.tokens, labels=data.held_out.tokens).loss)
    assert quality.base["loss"] == pytest.approx(expected, abs=1e-4)
    evaluator = Evaluator(adapter)
    lora = load_lora(bundle.path("lora.safetensors"), bundle.contract)
    for score, tensors in ((quality.quantized, None), (quality.adapted, lora)):
        assert score["loss"] == pytest.approx(evaluator.measure(bundle.config, data, tensors)["loss"], abs=1e-4)
    assert (quality.task, quality.examples, quality.tokens) == ("text", 5, data.held_out.target_count)
    path = save_quality(bundle, quality)
    assert find_quality(bundle) == (quality, "")
    path.unlink()


def test_examples_are_spread_over_the_held_out_ones(tiny_llama: Path) -> None:
    data = text_data(tiny_llama)
    picked = sampled(data, 3).held_out
    assert torch.equal(picked.tokens[0], data.held_out.tokens[0])
    assert torch.equal(picked.tokens[-1], data.held_out.tokens[-1])
    with pytest.raises(ConfigError, match="at least 1"):
        sampled(data, 0)


def test_another_model_is_refused(tiny_bundle: Path, tiny_llama: Path, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="give the bundle's model"):
        measure_quality(Bundle.open(tiny_bundle), text_data(tiny_llama), model=other)
