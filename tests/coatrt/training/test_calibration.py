"""How many tokens a training calibrates on, and what is said where they are too few."""

from pathlib import Path

import pytest
import torch

from coatrt.evaluation.curvature import measure_sensitivity
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.input_moments import calibration_examples
from coatrt.training.calibration import calibration_blocks, few_tokens_notice
from coatrt.training.options import TrainOptions
from coatrt.training.run import train
from support.tiny import text_data, tiny_options


def test_sensitivities_take_sixteen_blocks_and_error_feedback_what_its_width_wants(
    tiny_llama: Path, tmp_path: Path
) -> None:
    options = tiny_options(steps=1, preset="none", quantizer="feedback", calibration=None)
    adapter = train(tiny_llama, text_data(tiny_llama), tmp_path / "a", options)
    assert adapter.calibration is not None
    assert tuple(adapter.calibration.tokens.shape) == (20, 32)  # four tokens for each of the 160 inputs of down_proj
    train_examples = text_data(tiny_llama).train
    assert torch.equal(adapter.calibration.tokens, calibration_examples(train_examples, 20, 32, 0).tokens)
    examples = calibration_examples(train_examples, 16, 32, 0, others=True)
    codes = adapter.codes(Checkpoint.open(tiny_llama))
    model = FakeQuantModel(codes.checkpoint, codes)
    wanted = measure_sensitivity(model, codes, examples, adapter.description.space.formats)
    for name, costs in wanted.costs.items():
        assert adapter.description.sensitivity.costs[name] == pytest.approx(costs, rel=1e-5)


def test_error_feedback_wants_blocks_for_every_input(tiny_llama: Path) -> None:
    matrices = Checkpoint.open(tiny_llama).matrices  # its widest inputs are the 160 of down_proj
    for options, blocks in (
        (TrainOptions(max_length=32), 20),
        (TrainOptions(max_length=36), 18),
        (TrainOptions(max_length=256), 16),
        (TrainOptions(max_length=32, quantizer="weighted"), 16),
        (TrainOptions(max_length=32, calibration=3), 3),
    ):
        assert calibration_blocks(options, matrices) == blocks


def test_too_few_tokens_are_named(tiny_llama: Path) -> None:
    matrices = Checkpoint.open(tiny_llama).matrices
    enough, little = text_data(tiny_llama), text_data(tiny_llama, ["word " * 60])  # 300 tokens of a byte each
    assert few_tokens_notice(TrainOptions(max_length=32), matrices, enough) is None
    notice = few_tokens_notice(TrainOptions(max_length=32, calibration=4), matrices, enough)
    assert notice is not None and notice.startswith("refined is calibrated on 128 tokens; this model needs 640: give")
    notice = few_tokens_notice(TrainOptions(max_length=32), matrices, little)
    assert notice is not None and "on 256 tokens" in notice  # eight of nine blocks, one held out
    assert few_tokens_notice(TrainOptions(max_length=32, quantizer="weighted"), matrices, little) is None
