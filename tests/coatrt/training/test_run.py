"""A training from the model to the adapter: what it learns, what it records, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coatrt.adapter.adapter import Adapter
from coatrt.errors import CheckpointError, ConfigError
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.input_moments import InputMoments
from coatrt.training.config_sampler import TrainingSampler
from coatrt.training.output import check_output
from coatrt.training.run import train
from support.encoding import quantized_weight
from support.tiny import save_tiny_llama, text_data, tiny_options


def test_budgets_outside_the_formats_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"budgets must be within 3\.5"):
        train(tiny_llama, text_data(tiny_llama), tmp_path / "a", tiny_options(low_bits=2.0))
    assert not (tmp_path / "a").exists()


def test_budgets_that_nobody_gave_are_those_the_formats_allow() -> None:
    options = tiny_options(budgets=None)
    assert options.measured_budgets(2.25, 8.0) == (4.0, 5.0, 6.0)
    assert options.measured_budgets(4.25, 8.0) == (5.0, 6.0)
    assert options.measured_budgets(8.0, 16.0) == (12.0,)
    assert tiny_options(budgets=()).measured_budgets(2.25, 8.0) == ()


def test_a_training_that_is_not_finished_says_so(tmp_path: Path) -> None:
    (tmp_path / "a" / "training").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is not finished; continue it with coatrt train … --resume"):
        Adapter.from_pretrained(tmp_path / "a")
    with pytest.raises(ConfigError, match="holds an unfinished training; give --resume"):
        check_output(tmp_path / "a", resume=False, overwrite=False)
    check_output(tmp_path / "a", resume=True, overwrite=False)
    check_output(tmp_path / "new", resume=False, overwrite=False)


def test_a_model_that_cannot_be_exported_is_not_trained(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(CheckpointError, match="activation 'relu' cannot be exported"):
        train(model, text_data(model), tmp_path / "a", tiny_options())
    assert not (tmp_path / "a").exists()


def test_every_long_stage_calls_progress_and_nothing_is_printed(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path / "cache"))  # nothing is calibrated or encoded yet
    stages: dict[str, list[tuple[int, int]]] = {}

    def note(done: int, total: int, stage: str, note: str = "", /) -> None:
        stages.setdefault(stage, []).append((done, total))

    options = tiny_options(steps=2, quantizer="feedback", formats=("nf3-g32", "int8"))
    train(tiny_llama, text_data(tiny_llama), tmp_path / "a", options, progress=note)
    assert set(stages) - {"preflight"} == {  # which is shown once for a model
        "loading the model",
        "measuring gradients",
        "calibration",
        "quantizing",
        "measuring errors",
        "measuring inputs",
        "LoRA directions",
        "training",
        "compensation",
        "held-out loss",
    }
    assert all(calls[-1][0] == calls[-1][1] for calls in stages.values())
    assert stages["training"] == [(1, 2), (2, 2)]
    assert capsys.readouterr().out == ""


def test_training_learns_and_emits_by_configuration(tiny_adapter: Path, tiny_llama: Path) -> None:
    adapter = Adapter.from_pretrained(tiny_adapter)
    found = adapter.description.metrics["held_out"]
    row = found["budgets"][0]
    assert row["adapted"] < row["without"] - 0.5
    assert row["adapted"] < found["full_precision"] - 0.5
    low, high = (adapter.emit(adapter.description.space.uniform(text)) for text in ("nf3-g32", "int8"))
    tensor = adapter.description.contract.tensors[0]
    assert torch.equal(low[tensor.A], high[tensor.A])
    assert (low[tensor.B] - high[tensor.B]).abs().max() > 1e-4
    checkpoint = adapter.checkpoint(tiny_llama)
    model = FakeQuantModel(checkpoint, CodeStore(checkpoint))
    config = TrainingSampler(adapter.description.space, adapter.description.sensitivity.costs, 4.5, 7.0).plan_like(
        None, 5.0
    )
    assert config.hash == row["configuration"]
    model.set_config(config)
    model.set_lora(adapter.description.contract, adapter.emit(config))
    blocks = text_data(tiny_llama).held_out[:4]
    with torch.no_grad():
        assert model.loss(blocks).item() == pytest.approx(row["adapted"], rel=1e-5)


@pytest.mark.parametrize("quantizer", ["absmax", "feedback", "refined"])
def test_training_uses_the_codes_of_its_quantizer(tiny_llama: Path, tmp_path: Path, quantizer: Any) -> None:
    adapter = train(
        tiny_llama,
        text_data(tiny_llama),
        tmp_path / "a",
        tiny_options(steps=1, quantizer=quantizer, formats=("nf3-g32",), budgets=(3.5,)),
    )
    assert adapter.description.quantizer == adapter.description.metrics["options"]["quantizer"] == quantizer
    assert adapter.calibration is not None
    checkpoint = adapter.checkpoint()
    moments = InputMoments(checkpoint, adapter.calibration)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        weight = checkpoint.tensor(f"{name}.weight")
        error = (quantized_weight(checkpoint, name, "nf3-g32", quantizer, moments) - weight).norm() / weight.norm()
        assert adapter.description.sensitivity.errors[name]["nf3-g32"] == pytest.approx(float(error), rel=1e-5)
    config = adapter.description.space.uniform("nf3-g32")
    model = FakeQuantModel(checkpoint, adapter.codes(checkpoint))
    model.set_config(config)
    blocks = text_data(tiny_llama).held_out[:4]
    without = adapter.description.metrics["held_out"]["budgets"][0]["without"]
    with torch.no_grad():
        assert model.loss(blocks).item() == pytest.approx(without, rel=1e-5)


def test_other_files_are_neither_overwritten_nor_lost(tiny_llama: Path, tmp_path: Path) -> None:
    options, output = tiny_options(steps=1, preset="none"), tmp_path / "a"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files; give another directory"):
        train(tiny_llama, text_data(tiny_llama), output, options, overwrite=True)
    (output / "training").mkdir()  # as if it came there while a training ran
    train(tiny_llama, text_data(tiny_llama), output, options, overwrite=True)
    (output / "archive.json").write_text("of the first adapter")
    train(tiny_llama, text_data(tiny_llama), output, replace(options, seed=1), overwrite=True)
    assert (output / "thesis.txt").read_text() == "mine"
    assert not (output / "archive.json").exists()
    assert Adapter.from_pretrained(output).description.metrics["options"]["seed"] == 1
