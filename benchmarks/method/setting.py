"""Shared by all arms: model, task, formats, and the configurations to train on and to measure."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import smollm2
from tasks import TASKS

from coatrt.adapter.features import ConfigEncoder
from coatrt.cli.progress import drawn_progress
from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.data.examples import Examples
from coatrt.data.task_data import TaskData
from coatrt.evaluation.curvature import measure_sensitivity, output_gains
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.sensitivity_table import Sensitivity
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.tokenizer import load_tokenizer
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.input_moments import Calibration, InputMoments, calibration_examples
from coatrt.quantization.learned_scales import LearnedScales
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.distributed import Processes
from coatrt.system.json_data import read_as, write_json
from coatrt.system.tensors import read_tensors, write_tensors
from coatrt.training.config_sampler import TrainingSampler
from coatrt.training.options import TrainOptions
from coatrt.training.scale_learning import learn_scales, learning_budgets

__all__ = ["BATCH", "BUDGETS", "FORMATS", "PARTS", "TRAINED", "Draws", "Measured", "Setting"]

BATCH = {"sotu": 2, "trec": 16}  # examples of a configuration: about the same number of tokens for each task
PARTS = {"sotu": 1, "trec": 2}  # halves of a batch have less padding if lengths differ
Draws = Literal["ends", "sides", "even"]
FORMATS = ("nf2-g64", "nf3-g64", "nf4-g64", "int4-g64", "nvfp4", "int8")
TRAINED = tuple(2.5 + 0.5 * i for i in range(11))  # bits per weight of the configurations trained on
BUDGETS = (2.5, 3.0, 3.5, 4.5, 5.5, 7.5)  # those measured
_EACH = 5  # configurations of each
_HELD_OUT = 0.25  # held-out budgets lie so far above


@dataclass(frozen=True)
class Measured:
    """A configuration to measure.

    Args:
        budget: budget of its group, bits per weight.
        kind: "planned" for a planner's choice, "random" for a random map of that budget.
        is_trained: whether training uses it.
        config: the configuration.
    """

    budget: float
    kind: str
    is_trained: bool
    config: QuantConfig


@dataclass(frozen=True)
class Setting:
    """The model on one task.

    Args:
        task: a name of `tasks.TASKS`.
        scratch: directory for sensitivities and unfinished trainings.
        compute: torch device of the model.
        calibration: examples of 128 tokens for the sensitivities; more if they are shorter.
        learned: steps that learn scales before anything else (`coatrt.training.scale_learning`).
    """

    task: str
    scratch: Path
    compute: str = "cpu"
    calibration: int = 32
    learned: int = 0

    @property
    def model(self) -> str:
        """Name in files: SmolLM2-135M under the default quantizer, or with learned scales on top."""
        return "smollm2-learned" if self.learned else "smollm2-refined"

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model."""
        return smollm2()

    @cached_property
    def data(self) -> TaskData:
        """The task's examples."""
        return TASKS[self.task](load_tokenizer(self.checkpoint.directory))

    @cached_property
    def space(self) -> ConfigSpace:
        """All matrices, fused groups tied."""
        return ConfigSpace(self.checkpoint.matrices, tuple(map(WeightFormat.parse, FORMATS)))

    @cached_property
    def base(self) -> FakeQuantModel:
        """The model, for every arm."""
        return FakeQuantModel(self.checkpoint, self.codes, self.compute, decoded_bytes=4 << 30)

    @cached_property
    def codes(self) -> CodeStore:
        """Encoded matrices."""
        return CodeStore(self.checkpoint, "refined", self.tokens)

    @cached_property
    def tokens(self) -> Calibration:
        """Calibration of the moments."""
        return Calibration.of(calibration_examples(self.data.train, self.calibration, 128, 0))

    @cached_property
    def moments(self) -> InputMoments:
        """Second moments of the matrices' inputs."""
        return InputMoments(self.checkpoint, self.tokens)

    @cached_property
    def gains(self) -> dict[str, Tensor]:
        """Gradient energy at the outputs of the matrices."""
        path = self.scratch / f"gains-{self.task}.safetensors"
        if not path.is_file():
            self.base.set_config(None)
            self.base.set_pairs(None)
            with drawn_progress("gains") as progress:
                gains = output_gains(self.base, self._others, progress)
            write_tensors(path, {name: tensor.cpu() for name, tensor in gains.items()})
        stored = read_tensors(path)
        assert stored is not None
        return {name: tensor.to(self.compute) for name, tensor in stored[0].items()}

    @cached_property
    def _others(self) -> Examples:
        """Examples for sensitivities and gains, not those of the calibration."""
        return calibration_examples(self.data.train, self.calibration, 128, 0, others=True)

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """Costs and errors, measured once on training examples; first of all, scales are learned if they are to be."""
        first = self._sensitivity("smollm2-refined")
        if not self.learned:
            return first
        path = self.scratch / f"scales-{self.model}-{self.task}.safetensors"
        if not path.is_file():
            budgets = learning_budgets(self.space, TRAINED[0], TRAINED[-1])
            draw = TrainingSampler(self.space, first.costs, *budgets).draw
            options = TrainOptions(
                formats=FORMATS, learn_scales=self.learned, batch=BATCH[self.task], accumulate=PARTS[self.task]
            )
            state, identity = self.scratch / path.stem, f"{options} {self.data.digest}"
            with drawn_progress("scales") as progress:
                learn_scales(
                    *(self.base, self.codes, self.space, self.data.train, draw, options, state, identity),
                    Processes(),
                    progress,
                ).save(path)
        self.codes.use(LearnedScales.load(path))
        self.base.forget()
        return self._sensitivity(self.model)

    def _sensitivity(self, name: str) -> Sensitivity:
        path = self.scratch / f"sensitivity-{name}-{self.task}.json"
        if not path.is_file():
            with drawn_progress("sensitivity") as progress:
                sensitivity = measure_sensitivity(self.base, self.codes, self._others, self.space.formats, progress)
            write_json(path, sensitivity)
        return read_as(path, Sensitivity, "sensitivities", "remove the file to measure them again")

    @cached_property
    def encoder(self) -> ConfigEncoder:
        """Inputs of θ."""
        return ConfigEncoder(self.checkpoint.matrices, self.space.formats, self.sensitivity.errors)

    @cached_property
    def _sampler(self) -> TrainingSampler:
        return TrainingSampler(self.space, self.sensitivity.costs, TRAINED[0], TRAINED[-1])

    @cached_property
    def pool(self) -> tuple[QuantConfig, ...]:
        """The configurations to train on: per budget the planner's, three with noise on the costs, one random map."""
        rng, configs = np.random.default_rng(1), []
        for bits in TRAINED:
            configs.append(self._sampler.plan_like(None, bits))
            configs += [self._sampler.plan_like(rng, bits) for _ in range(3)]
            configs.append(self.space.sample(rng, bits))
        return tuple(configs)

    @cached_property
    def measured(self) -> tuple[Measured, ...]:
        """Configurations to measure: per budget planned and random ones, trained on or not; fewer for questions."""
        rng, rows = np.random.default_rng(2), []
        for bits in BUDGETS:
            at = _EACH * TRAINED.index(bits)
            above = (self._sampler.plan_like(None, bits + _HELD_OUT + 0.02 * step) for step in range(10))
            disturbed = (self._sampler.plan_like(rng, bits) for _ in range(10))
            rows += [
                Measured(bits, "planned", True, self.pool[at]),
                Measured(bits, "planned", False, self._unseen(above)),
                Measured(bits, "planned", False, self._unseen(disturbed)),
                Measured(bits, "random", True, self.pool[at + 4]),
                Measured(bits, "random", False, self.space.sample(rng, bits)),
            ]
        assert all((entry.config in self.pool) == entry.is_trained for entry in rows)
        few = slice(None) if self.data.choices is None else [0, 1, 4]
        return tuple(np.array(rows, object).reshape(-1, _EACH)[:, few].flat)

    def _unseen(self, draws: Iterable[QuantConfig]) -> QuantConfig:
        """Return the first that is not trained on."""
        return next(config for config in draws if config not in self.pool)

    def draw(self, step: int, seed: int, draws: Draws) -> list[QuantConfig]:
        """Return the two configurations of a step, see `arms.Arm`."""
        rng = np.random.default_rng([seed, step])
        ends = (self.pool[:_EACH], self.pool[-_EACH:])
        sides = (self.pool[: 3 * _EACH], self.pool[-3 * _EACH :])
        first = {"ends": ends[step % 2], "sides": sides[step % 2], "even": self.pool}[draws]
        return [first[rng.integers(len(first))], self.pool[rng.integers(len(self.pool))]]

    def lora_bits(self, parameters: int) -> float:
        """Return the bits per weight that a LoRA with `elements` in fp16 adds."""
        return 16 * parameters / self.checkpoint.matrices.parameters
