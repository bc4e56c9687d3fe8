"""Learned scales: gradients against finite differences, what they gain, and that they reach every later step."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import coatrt.training.loop as loop
from coatrt.adapter.adapter import Adapter
from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.data.examples import IGNORED, Examples
from coatrt.errors import CheckpointError
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode
from coatrt.quantization.learned_scales import LearnedScales
from coatrt.quantization.weight_format import WeightFormat
from coatrt.training.objective import Pass
from coatrt.training.run import train
from coatrt.training.scale_learning import ScaleChanges, distil, learning_budgets
from support.formats import random_config
from support.tiny import TEXTS, save_tiny_llama, text_data, tiny_options

FORMATS = ("nf2-g64", "nf3-g32", "int4-g32", "nvfp4", "int8", "nf4-g32-dq8-fp16-64")
LEARNING = {"nf2-g64", "nf3-g32", "int4-g32"}  # with K = 100 their last block is padded


@dataclass(frozen=True)
class Setting:
    model: FakeQuantModel
    codes: CodeStore
    space: ConfigSpace
    passes: list[Pass]

    def divergence(self, changes: ScaleChanges) -> float:
        """Return the mean KL(full precision ‖ quantized) per target in float64, from codes, scales and changes."""
        values = []
        for one in self.passes:
            self.model.set_config(None)
            exact = self.model.predictions(one.batch)[0].double().log_softmax(-1)
            self.model.set_config(one.config)
            for matrix in self.space.model.targets:
                found = self.codes.get(matrix.name, one.config[matrix.name])
                if (change := self.changed(changes, matrix.name, str(found.format))) is not None:
                    factor = np.repeat(1 + change.detach().double().numpy(), found.format.block, axis=1)
                    weight = decode(found).double().numpy() * factor[:, : matrix.K]
                    self.model.set_weights([(matrix.name, torch.from_numpy(weight))])
            with torch.no_grad():
                near = self.model.predictions(one.batch)[0].double().log_softmax(-1)
            values.append(float((exact.exp() * (exact - near)).sum() / one.total))
        self.model.set_config(None)
        return float(np.mean(values))

    @staticmethod
    def changed(changes: ScaleChanges, name: str, fmt: str) -> torch.Tensor | None:
        return dict(zip(changes.learning, changes.changes, strict=True)).get((name, fmt))


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    checkpoint = Checkpoint.open(
        save_tiny_llama(tmp_path_factory.mktemp("scales") / "model", intermediate_size=100, initializer_range=0.2)
    )
    codes = CodeStore(checkpoint)
    space = ConfigSpace(checkpoint.matrices, tuple(map(WeightFormat.parse, FORMATS)))
    tokens = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(1))
    targets = tokens.clone()
    targets[:, 0] = targets[0, :9] = targets[3, 1:-1] = IGNORED
    data, rng = Examples(tokens, targets), np.random.default_rng(0)
    parts = [data[torch.tensor(rows)] for rows in ([0, 1, 2], [3, 4, 5, 5])]
    passes = [Pass(random_config(space, rng), part, part.target_count) for part in parts]
    return Setting(FakeQuantModel(checkpoint, codes), codes, space, passes)


def test_scales_are_learned_at_budgets_where_they_are_used(setting: Setting) -> None:
    low, high = learning_budgets(setting.space, 3.0, 8.0)
    assert (low, high) == (3.0, 1.25 * (4 + 16 / 32))  # nf2-g64 to int4-g32 learn
    assert learning_budgets(setting.space, 3.0, 4.0) == (3.0, 4.0)
    assert learning_budgets(setting.space, 6.0, 8.0) == (6.0, 6.0)
    without = ConfigSpace(setting.space.model, tuple(map(WeightFormat.parse, ("int8", "fp16"))))
    assert learning_budgets(without, 8.5, 12.0) == (8.5, 12.0)


def test_formats_with_float16_scales_of_few_bits_learn(setting: Setting) -> None:
    changes = ScaleChanges(setting.codes, setting.space)
    assert {fmt for _, fmt in changes.learning} == LEARNING
    assert {name for name, _ in changes.learning} == {matrix.name for matrix in setting.space.model.targets}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_those_of_finite_differences(setting: Setting, accumulate: int) -> None:
    changes = ScaleChanges(setting.codes, setting.space)
    generator = torch.Generator().manual_seed(0)
    for change in changes.changes:
        change.data = 0.02 * torch.randn(change.shape, generator=generator)
    losses = distil(setting.model, changes, setting.passes, accumulate)
    assert float(losses.mean()) == pytest.approx(setting.divergence(changes), rel=1e-4)
    used = [change for change in changes.changes if change.grad is not None]
    assert 5 < len(used) < len(changes.changes)  # those of the two configurations
    assert not any(weight.requires_grad or weight.grad is not None for weight in setting.model.model.parameters())
    for change in used[::4]:
        assert change.grad is not None
        place = np.unravel_index(int(change.grad.abs().argmax()), change.shape)
        sides = []
        for step in (3e-3, -3e-3):
            before = float(change.data[place])
            change.data[place] += step
            sides.append(setting.divergence(changes))
            change.data[place] = before
        assert (sides[0] - sides[1]) / 6e-3 == pytest.approx(float(change.grad[place]), rel=0.02)


def test_changed_scales_are_the_scales_times_the_change(setting: Setting) -> None:
    changes = ScaleChanges(setting.codes, setting.space)
    changes.changes[3].data.fill_(0.125)
    scales = changes.scales()
    name, fmt = changes.learning[3]
    before = setting.codes.get(name, fmt).scales
    assert before is not None
    np.testing.assert_array_equal(
        scales.tensors[name, fmt].numpy(), (before.float().numpy() * np.float32(1.125)).astype(np.float16)
    )
    other, kind = changes.learning[4]
    untouched = setting.codes.get(other, kind).scales
    assert untouched is not None and torch.equal(scales.tensors[other, kind], untouched)


@torch.no_grad()
def held_out_divergence(adapter: Adapter, config: QuantConfig, examples: Examples) -> float:
    checkpoint = adapter.checkpoint()
    model = FakeQuantModel(checkpoint, adapter.codes(checkpoint))
    exact = model.predictions(examples)[0].double().log_softmax(-1)
    model.set_config(config)
    near = model.predictions(examples)[0].double().log_softmax(-1)
    return float((exact.exp() * (exact - near)).sum(1).mean())


def test_a_training_learns_scales_keeps_them_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_llama(tmp_path / "model")
    data = text_data(model, TEXTS)
    options = tiny_options(formats=("nf2-g64", "int4-g32", "int8"), learn_scales=24, quantizer="refined", steps=1)
    plain = train(model, data, tmp_path / "plain", tiny_options(formats=options.formats, quantizer="refined", steps=1))
    assert plain.scales is None and not (tmp_path / "plain" / "scales.safetensors").exists()
    whole = train(model, data, tmp_path / "whole", options)
    assert whole.scales is not None and len(whole.scales.tensors) == 2 * 7 * 2
    config = whole.description.space.config(np.zeros(len(whole.description.space.groups), int))
    before, after = (held_out_divergence(adapter, config, data.held_out) for adapter in (plain, whole))
    assert after < 0.98 * before
    # Interrupted while scales are learned, it goes on to the same bytes.
    saved, save = [], loop.save_state

    def interrupted(*arguments: object) -> None:
        save(*arguments)  # type: ignore[arg-type]
        saved.append(arguments)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, data, tmp_path / "cut", options)
    monkeypatch.setattr(loop, "save_state", save)
    assert (tmp_path / "cut" / "training" / "scales").is_dir()
    train(model, data, tmp_path / "cut", options, resume=True)
    files = [hashlib.sha256((tmp_path / run / "scales.safetensors").read_bytes()) for run in ("whole", "cut")]
    assert files[0].digest() == files[1].digest()


def test_scales_of_another_shape_are_refused(setting: Setting, tmp_path: Path) -> None:
    name = setting.space.model.targets[0].name
    wrong = LearnedScales({(name, "int4-g32"): torch.ones(3, 2, dtype=torch.float16)})
    wrong.save(tmp_path / "scales.safetensors")
    codes = CodeStore(setting.model.checkpoint, learned=LearnedScales.load(tmp_path / "scales.safetensors"))
    with pytest.raises(CheckpointError, match=r"learned scales of .* have the shape \(3, 2\), \(64, 2\) is needed"):
        codes.get(name, "int4-g32")
    (tmp_path / "scales.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is missing or damaged"):
        LearnedScales.load(tmp_path / "scales.safetensors")
    LearnedScales({(name, "int4-g32"): torch.full((64, 2), torch.inf, dtype=torch.float16)}).save(tmp_path / "s")
    with pytest.raises(CheckpointError, match="no finite float16 scales"):
        LearnedScales.load(tmp_path / "s")


def test_an_adapter_that_is_read_decodes_with_its_scales(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    data = text_data(model, TEXTS)
    options = tiny_options(formats=("nf3-g32", "int8"), learn_scales=2, steps=1)
    trained = train(model, data, tmp_path / "a", options)
    again = Adapter.from_pretrained(tmp_path / "a")
    checkpoint = again.checkpoint()
    name = "model.layers.1.mlp.up_proj"
    found = again.codes(checkpoint).get(name, "nf3-g32")
    assert trained.scales is not None and found.scales is not None
    assert torch.equal(found.scales, trained.scales.tensors[name, "nf3-g32"])
    assert not torch.equal(found.scales, CodeStore(checkpoint).get(name, "nf3-g32").scales)  # type: ignore[arg-type]
