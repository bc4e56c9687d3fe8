"""How an adapter is trained: every option, checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from coatrt.adapter.hypernetwork import Preset
from coatrt.errors import ConfigError
from coatrt.models.matrices import ModelMatrices
from coatrt.quantization.codec import FED_BACK, QUANTIZERS, Quantizer
from coatrt.quantization.input_moments import tokens_wanted
from coatrt.quantization.weight_format import WeightFormat

__all__ = ["DEFAULT_FORMATS", "SENSITIVITY_BLOCKS", "TrainOptions"]

DEFAULT_FORMATS = ("nf3-g64", "nf4-g64", "int4-g64", "nvfp4", "fp8", "int8", "fp16")
"""Some format for every device, from 3.25 bits up."""

SENSITIVITY_BLOCKS = 16
"""Blocks for the sensitivities where no number is given: 4,096 tokens; with 1,024 they rank well (docs/method.md)."""

_CHOICES = {
    "preset": ("coatrt", "paper", "none"),
    "start": ("residual", "mixed", "random"),
    "teacher": ("base", "top"),
    "precision": ("float32", "bfloat16"),
}


@dataclass(frozen=True)
class TrainOptions:
    """How an adapter is trained.

    Args:
        formats: formats a configuration may use, as text.
        rank: LoRA rank, a multiple of 16.
        alpha: LoRA scale numerator.
        ranks: (module kind, rank) where it differs from `rank`, as in (("down_proj", 32),).
        preset: form of θ, "coatrt" or "paper"; "none" leaves it out: only the compensation tells configurations apart.
        compensation: whether B has a term per format that makes up for quantization, see `coatrt.adapter.compensation`.
        start: where A begins: with compensation "residual", the directions of what the format of fewest bits takes
            away, "random", random numbers, or "mixed", half of its columns each (docs/method.md compares them); without
            compensation always random.
        quantizer: how weights are encoded, see `coatrt.quantization.codec.encode`; "absmax" is the paper's.
        fused: whether q/k/v and gate/up share a format.
        steps: optimizer steps.
        batch: blocks (examples) per configuration and step.
        same_examples: whether the configurations of a step all see the same examples, as they always do with a teacher;
            otherwise each has its own.
        accumulate: parts a batch is cut into, rows of like length together, to save memory and padding; the gradient is
            the same.
        length: tokens per block.
        configs: configurations per step (their gradients are averaged); of several the first has few bits and many in
            turn, see `TrainingSampler`.
        low_bits: lowest budget trained for; None: the least the formats allow.
        high_bits: highest budget; None: the most the formats allow, at most 8.5.
        planned: share of planner-like configurations, see `TrainingSampler`.
        learning_rate: peak rate of A.
        rate_ratio: peak rate of B over that of A (LoRA+, arXiv 2402.12354); None: 4 with compensation, 1 without.
        theta_rate: peak rate of θ.
        warmup: share of the steps in which the rates rise; then they fall along a cosine to zero.
        clip: largest norm of the gradient.
        distill: weight of the divergence from a teacher's predictions beside the task's loss; 0 for none.
        teacher: "base" is the full-precision model without adapter (a third forward pass); "top" the configuration
            with the most bits of the same step.
        precision: of the model's weights and products, in training and in what is measured; "bfloat16" takes half the
            memory. What is trained, its optimizer, compensation and losses are float32 in any case.
        calibration: blocks (examples) for the sensitivities and for second moments; of examples shorter than `length`
            as many more as make up for it. None: 16, and for the moments of "gptq" and "feedback" as many as have four
            tokens for each input of the widest matrix (`coatrt.quantization.input_moments.tokens_wanted`).
        evaluation: held-out blocks (examples, questions) for the numbers in metrics.json.
        budgets: average bits at which the held-out loss is measured, after training and for `patience`.
        evaluate_every: steps between measurements of the hypervolume over `budgets`; 0 for none.
        patience: measurements without a better hypervolume after which training stops; the best adapter is kept. 0
            never stops.
        checkpoint_every: steps between checkpoints.
        seed: of start values, batches and configurations.

    Raises:
        ConfigError: a value out of range.
        FormatError: an unknown format.
    """

    formats: tuple[str, ...] = DEFAULT_FORMATS
    rank: int = 16
    alpha: float = 32.0
    ranks: tuple[tuple[str, int], ...] = ()
    preset: Preset = "none"
    compensation: bool = True
    start: Literal["residual", "mixed", "random"] = "mixed"
    quantizer: Quantizer = "feedback"
    fused: bool = True
    steps: int = 300
    batch: int = 4
    same_examples: bool = False
    accumulate: int = 1
    length: int = 256
    configs: int = 2
    low_bits: float | None = None
    high_bits: float | None = None
    planned: float = 0.75
    learning_rate: float = 1e-3
    rate_ratio: float | None = None
    theta_rate: float = 1e-4
    warmup: float = 0.1
    clip: float = 1.0
    distill: float = 0.0
    teacher: Literal["base", "top"] = "base"
    precision: Literal["float32", "bfloat16"] = "float32"
    calibration: int | None = None
    evaluation: int = 16
    budgets: tuple[float, ...] = (4.0, 5.0, 6.0)
    evaluate_every: int = 0
    patience: int = 0
    checkpoint_every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        for text in self.formats:
            WeightFormat.parse(text)
        if self.quantizer not in QUANTIZERS:
            raise ConfigError(f"no quantizer {self.quantizer!r}; allowed: {', '.join(QUANTIZERS)}")
        least = {
            "steps": 1,
            "batch": 1,
            "accumulate": 1,
            "length": 2,
            "configs": 1,
            "calibration": 1,
            "evaluation": 1,
            "checkpoint_every": 1,
            "evaluate_every": 0,
            "patience": 0,
            "distill": 0,
            "seed": 0,
        }
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ConfigError(f"{name} {value} is given; give at least {minimum}")
        for name in ("learning_rate", "rate_ratio", "theta_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} {getattr(self, name)} is given; give a positive number")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} {getattr(self, name)!r} is given; allowed: {', '.join(allowed)}")
        if self.accumulate > self.batch:
            raise ConfigError(f"a batch of {self.batch} cannot be cut into {self.accumulate} parts; give fewer")
        if self.patience and not (self.evaluate_every and self.budgets):
            raise ConfigError("patience needs evaluate_every and budgets; give them, or no patience")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup {self.warmup} is given; give a share of the steps, 0 to 1")

    def calibration_blocks(self, model: ModelMatrices) -> int:
        """Return the blocks whose second moments the quantizer sees."""
        if self.calibration is not None:
            return self.calibration
        wanted = tokens_wanted(model) if self.quantizer in FED_BACK else 0
        return max(SENSITIVITY_BLOCKS, math.ceil(wanted / self.length))

    @property
    def rates(self) -> Mapping[str, float]:
        """Peak learning rate of each group of parameters: "A", "B", "theta"."""
        ratio = self.rate_ratio if self.rate_ratio is not None else 4.0 if self.compensation else 1.0
        return {"A": self.learning_rate, "B": ratio * self.learning_rate, "theta": self.theta_rate}

    def rate(self, step: int) -> float:
        """Return the share of the peak learning rate at a step."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))
