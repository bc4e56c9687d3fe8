"""Fake quantization, sensitivities, sampling, and the training loop with its checkpoints."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from coatrt.adapter.adapter import Adapter
from coatrt.configs.config import QuantConfig
from coatrt.data.documents import batches, read_documents, tokenize_text
from coatrt.data.examples import Examples
from coatrt.data.text import text_task
from coatrt.errors import ConfigError
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.sensitivity import measure_sensitivity
from coatrt.models.checkpoint import Checkpoint, load_model, load_tokenizer
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode, encode, relative_error
from coatrt.quantization.input_moments import InputMoments, calibration_examples
from coatrt.quantization.weight_format import WeightFormat
from coatrt.training.config_sampler import TrainingSampler
from coatrt.training.run import TrainOptions, train
from support.tiny import TEXTS, tiny_options


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


def test_every_block_is_seen_once_per_epoch() -> None:
    seen = torch.cat([batches(10, 4, step, seed=3) for step in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert torch.equal(batches(10, 4, 3, 3), batches(10, 4, 3, 3))


def test_held_out_documents_are_not_trained_on(tiny_llama: Path) -> None:
    from coatrt.models.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(tiny_llama)
    documents = [chr(ord("a") + i) * 50 for i in range(20)]
    data = tokenize_text(tokenizer, documents, 10)
    held = set(tokenizer("ak")["input_ids"])
    end = {tokenizer.eos_token_id}
    assert set(data.held_out.unique().tolist()) == held | end
    assert not set(data.train.unique().tolist()) & held
    assert len(data.train) == 18 * 51 // 10


def test_missing_and_empty_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no-such\.txt does not exist"):
        read_documents([tmp_path / "no-such.txt"])
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="no text in"):
        read_documents([tmp_path])
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_documents([tmp_path])


def test_sampler_keeps_budgets_and_draws_few_and_many_bits_in_turn(tiny_adapter: Path) -> None:
    adapter = Adapter.load(tiny_adapter)
    sampler = TrainingSampler(adapter.space, adapter.sensitivity.costs, 4.5, 7.0, seed=1)
    bits = np.array([[c.average_bits(adapter.model) for c in sampler.draw(step, 3)] for step in range(40)])
    step = 8 * adapter.space.sizes.max() / adapter.model.parameters  # the coarsest change a group can make
    few, many = bits[::2, 0], bits[1::2, 0]
    for side, low, high in ((few, 4.5, 5.0), (many, 6.5, 7.0)):
        assert (side <= high + 0.05).all()
        assert (side >= low - step).all()
        assert side.std() > 0.08
    for column in (1, 2):
        assert bits[:, column].min() < 5.0
        assert bits[:, column].max() > 6.5
    assert (bits <= 7.0 + 0.05).all()
    alone = [sampler.draw(step, 1)[0].average_bits(adapter.model) for step in range(40)]
    assert max(alone) > 6.5
    assert sampler.draw(7, 3) == sampler.draw(7, 3)
    assert sampler.draw(7, 3) != sampler.draw(8, 3)


def test_planner_like_draws_are_near_the_knapsack_optimum(tiny_adapter: Path) -> None:
    from coatrt.planning.knapsack import allocate, cost_matrix

    adapter = Adapter.load(tiny_adapter)
    space, costs = adapter.space, adapter.sensitivity.costs
    sampler = TrainingSampler(space, costs, 4.5, 7.0)
    price = cost_matrix(space, costs)

    def total(config: QuantConfig) -> float:
        return float(sum(price[i, space.formats.index(config[group[0]])] for i, group in enumerate(space.groups)))

    for bits in (4.6, 5.0, 6.0):
        best = total(allocate(space, costs, max_bytes=bits * space.model.parameters / 8))
        drawn = sampler.plan_like(None, bits)
        assert drawn.average_bits(space.model) <= bits
        assert best <= total(drawn) * (1 + 1e-3)
        assert total(drawn) <= total(space.uniform("nf3-g32"))


def test_budgets_outside_the_formats_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the formats allow 3\.5"):
        train(tiny_llama, TEXTS, tmp_path / "a", tiny_options(low_bits=2.0))
    assert not (tmp_path / "a").exists()


def test_training_learns_and_emits_by_configuration(tiny_adapter: Path, tiny_llama: Path) -> None:
    adapter = Adapter.load(tiny_adapter)
    found = adapter.metrics["held_out"]
    row = found["budgets"][0]
    assert row["adapted"] < row["without"] - 0.5
    assert row["adapted"] < found["full_precision"] - 0.5
    low, high = (adapter.emit(adapter.space.uniform(text)) for text in ("nf3-g32", "int8"))
    tensor = adapter.contract.tensors[0]
    assert torch.equal(low[tensor.A], high[tensor.A])
    assert (low[tensor.B] - high[tensor.B]).abs().max() > 1e-4
    checkpoint = adapter.checkpoint(tiny_llama)
    model = FakeQuantModel(checkpoint, CodeStore(checkpoint))
    config = TrainingSampler(adapter.space, adapter.sensitivity.costs, 4.5, 7.0).plan_like(None, 5.0)
    assert config.hash == row["configuration"]
    model.set_config(config)
    model.set_lora(adapter.contract, adapter.emit(config))
    from coatrt.models.checkpoint import load_tokenizer

    blocks = tokenize_text(load_tokenizer(tiny_llama), TEXTS, 32).held_out[:4]
    with torch.no_grad():
        assert model.loss(Examples.of_blocks(blocks)).item() == pytest.approx(row["adapted"], rel=1e-5)


@pytest.mark.parametrize("quantizer", ["absmax", "feedback"])
def test_training_uses_the_codes_of_its_quantizer(tiny_llama: Path, tmp_path: Path, quantizer: Any) -> None:
    adapter = train(
        tiny_llama,
        TEXTS,
        tmp_path / "a",
        tiny_options(steps=1, quantizer=quantizer, formats=("nf3-g32",), budgets=(3.5,)),
    )
    assert adapter.quantizer == adapter.metrics["options"]["quantizer"] == quantizer
    assert adapter.calibration is not None
    checkpoint = adapter.checkpoint()
    moments = InputMoments(checkpoint, adapter.calibration)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        tokens = adapter.calibration.tokens.numel()
        encoded = encode(checkpoint.tensor(f"{name}.weight"), "nf3-g32", quantizer, moments.get(name), tokens)
        error = relative_error(checkpoint.tensor(f"{name}.weight"), encoded)
        assert adapter.sensitivity.errors[name]["nf3-g32"] == pytest.approx(error, rel=1e-5)
    config = adapter.space.uniform("nf3-g32")
    model = FakeQuantModel(checkpoint, adapter.codes(checkpoint))
    model.set_config(config)
    blocks = tokenize_text(load_tokenizer(tiny_llama), TEXTS, 32).held_out[:4]
    without = adapter.metrics["held_out"]["budgets"][0]["without"]
    with torch.no_grad():
        assert model.loss(Examples.of_blocks(blocks)).item() == pytest.approx(without, rel=1e-5)


def test_weights_from_elsewhere_stay_until_a_format_is_set(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    model, name = FakeQuantModel(checkpoint, CodeStore(checkpoint)), "model.layers.0.mlp.up_proj"
    tokens, weight = torch.arange(12)[None], checkpoint.tensor("model.layers.0.mlp.up_proj.weight")
    plain = model.logits(tokens)
    model.set_weights([(name, torch.zeros_like(weight))])
    assert not torch.allclose(model.logits(tokens), plain, atol=1e-3)
    model.set_config(None)
    assert torch.equal(model.logits(tokens), plain)


class _Killed(Exception):
    pass


def test_a_resumed_run_equals_an_unbroken_one(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tiny_llama, TEXTS, tmp_path / "whole", tiny_options())
    draw = TrainingSampler.draw

    def killed(self: TrainingSampler, step: int, count: int) -> list[QuantConfig]:
        if step == 5:
            raise _Killed
        return draw(self, step, count)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingSampler, "draw", killed)
        with pytest.raises(_Killed):
            train(tiny_llama, TEXTS, tmp_path / "broken", tiny_options())
    with pytest.raises(ConfigError, match="--resume to go on"):
        train(tiny_llama, TEXTS, tmp_path / "broken", tiny_options())
    with pytest.raises(ConfigError, match="other options"):
        train(tiny_llama, TEXTS, tmp_path / "broken", tiny_options(seed=5), resume=True)
    resumed = train(tiny_llama, TEXTS, tmp_path / "broken", tiny_options(), resume=True)
    assert resumed.metrics["losses"] == whole.metrics["losses"]
    first, second = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert train(tiny_llama, TEXTS, tmp_path / "broken", tiny_options(), resume=True).metrics == resumed.metrics
    with pytest.raises(ConfigError, match="finished adapter"):
        train(tiny_llama, TEXTS, tmp_path / "broken", tiny_options())


def test_a_killed_process_resumes(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{i:02}.txt").write_text(text)
    arguments = [
        sys.executable,
        "-m",
        "coatrt",
        "train",
        str(tiny_llama),
        "--data",
        str(tmp_path / "text"),
        "-o",
        str(tmp_path / "out"),
        "--formats",
        "int4-g32,int8",
        "--steps",
        "100000",
        "--length",
        "32",
        "--batch",
        "2",
        "--evaluation",
        "2",
        "--budgets",
        "5",
        "--checkpoint-every",
        "1",
    ]
    state = tmp_path / "out" / "training" / "state.json"
    deadline = time.monotonic() + 240

    def wait_for(step: int, process: subprocess.Popen[bytes]) -> None:
        while not (state.is_file() and json.loads(state.read_text())["progress"]["step"] >= step):
            assert process.poll() is None, "training ended"
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(3, process)
        finally:
            os.kill(process.pid, signal.SIGKILL)
    left = json.loads(state.read_text())["progress"]
    assert left["step"] >= 3
    assert all(math.isfinite(loss) for losses in left["losses"] for loss in losses)
    wrong = subprocess.run(arguments, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "--resume" in wrong.stderr
    with subprocess.Popen([*arguments, "--resume"], stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(left["step"] + 3, process)
        finally:
            process.kill()
    assert json.loads(state.read_text())["progress"]["losses"][: left["step"]] == left["losses"]


def test_sensitivities_take_sixteen_blocks_and_error_feedback_what_its_width_wants(
    tiny_llama: Path, tmp_path: Path
) -> None:
    options = tiny_options(steps=1, preset="none", quantizer="feedback", calibration=None)
    adapter = train(tiny_llama, TEXTS, tmp_path / "a", options)
    assert adapter.calibration is not None
    assert tuple(adapter.calibration.tokens.shape) == (20, 32)  # four tokens for each of the 160 inputs of down_proj
    data = text_task(load_tokenizer(tiny_llama), TEXTS, 32).train
    examples = calibration_examples(data, 16, 32, 0)
    assert torch.equal(adapter.calibration.tokens[:16], examples.tokens)
    codes = adapter.codes(Checkpoint.open(tiny_llama))
    model = FakeQuantModel(codes.checkpoint, codes)
    wanted = measure_sensitivity(model, codes, examples, adapter.space.formats)
    for name, costs in wanted.costs.items():
        assert adapter.sensitivity.costs[name] == pytest.approx(costs, rel=1e-5)


def test_resuming_takes_no_sensitivities_of_another_run(tiny_llama: Path, tmp_path: Path) -> None:
    """A kill between them and the first checkpoint leaves nothing but these."""
    options, output = tiny_options(steps=1, preset="none"), tmp_path / "a"

    def interrupted(options: TrainOptions) -> None:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("coatrt.training.run.optimise", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            train(tiny_llama, TEXTS, output, options)

    interrupted(options)
    left = (output / "training" / "sensitivity.json").read_bytes()
    with pytest.raises(ConfigError, match="resume with the same ones"):
        train(tiny_llama, TEXTS, output, replace(options, calibration=2), resume=True)
    assert (output / "training" / "sensitivity.json").read_bytes() == left
    (output / "training" / "run.json").unlink()  # as an older version left it: whose they are nobody knows
    adapter = train(tiny_llama, TEXTS, output, replace(options, calibration=2), resume=True)
    fresh = train(tiny_llama, TEXTS, tmp_path / "b", replace(options, calibration=2))
    assert adapter.sensitivity.costs == fresh.sensitivity.costs
    assert (output / "training").exists() is False


def test_other_files_are_neither_overwritten_nor_lost(tiny_llama: Path, tmp_path: Path) -> None:
    options, output = tiny_options(steps=1, preset="none"), tmp_path / "a"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files; give another directory"):
        train(tiny_llama, TEXTS, output, options, overwrite=True)
    (output / "training").mkdir()  # as if it came there while a training ran
    train(tiny_llama, TEXTS, output, options, overwrite=True)
    (output / "archive.json").write_text("of the first adapter")
    train(tiny_llama, TEXTS, output, replace(options, seed=1), overwrite=True)
    assert (output / "thesis.txt").read_text() == "mine"
    assert not (output / "archive.json").exists()
    assert Adapter.load(output).metrics["options"]["seed"] == 1
