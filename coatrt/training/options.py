"""Options of training with their help, defaults and limits, shared with the command line."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

from coatrt.adapter.preset import Preset
from coatrt.errors import ConfigError
from coatrt.quantization.quantizers import Quantizer
from coatrt.quantization.weight_format import WeightFormat

__all__ = ["DEFAULT_FORMATS", "TrainOptions"]

DEFAULT_FORMATS = ("nf3-g64", "nf4-g64", "int4-g64", "nvfp4", "fp8", "int8", "fp16")
"""At least one format for every device, from 3.25 bits up."""

_MAX_RANK = 4096
_SCALES_RATE = 2e-3  # peak learning rate of relative changes of scales
_WARMUP = 0.1  # share of the steps in which learning rates rise

_BUDGETS = (4.0, 5.0, 6.0)

T = TypeVar("T")


def _option(
    default: T,
    help: str,
    *,
    least: int | None = None,
    above: float | None = None,
    most: float = math.inf,
    unset: str | None = None,
) -> T:
    """Return a field of `TrainOptions`.

    Args:
        default: default value.
        help: help text.
        least: minimum.
        above: exclusive minimum of a finite value.
        most: maximum.
        unset: meaning of the default None.
    """
    return field(default=default, metadata={"help": help, "least": least, "above": above, "most": most, "unset": unset})


@dataclass(frozen=True)
class TrainOptions:
    """Options of training.

    Raises:
        ConfigError: a value is not allowed.
        FormatError: an unknown format.
    """

    formats: tuple[str, ...] = _option(DEFAULT_FORMATS, "Weight formats a configuration may use.")
    rank: int = _option(16, "LoRA rank, a multiple of 16.", least=1, most=_MAX_RANK)
    alpha: float = _option(32.0, "LoRA alpha: products are scaled by alpha / rank.", above=0, most=1e6)
    ranks: tuple[tuple[str, int], ...] = _option(
        (), "Ranks of target modules that differ from --rank, such as down_proj=32."
    )
    preset: Preset = _option(
        "none",
        "Hypernetwork: coatrt, paper (arXiv 2509.25214), or none; with none, the LoRA depends on the configuration by "
        "compensation alone.",
    )
    compensation: bool = _option(True, "Add the closed-form compensation term to B, one per format.")
    start: Literal["mixed", "residual", "random"] = _option(
        "mixed",
        "Initial A: residual, the main directions of the quantization error in the format of fewest bits; random; or "
        "mixed, half of the columns each. Without compensation always random.",
    )
    quantizer: Quantizer = _option("refined", "Quantizer of the weights.")
    learn_scales: int = _option(
        0,
        "Steps that first learn the scales of formats of at most four bits from the full-precision model, under "
        "configurations as in training; they lower the loss with and without a LoRA.",
        least=0,
        most=10**9,
    )
    steps: int = _option(300, "Optimizer steps.", least=1, most=10**9)
    batch: int = _option(
        4, "Blocks of text (examples) per configuration; a step has two configurations.", least=1, most=65536
    )
    accumulate: int = _option(
        1,
        "Parts that a batch is cut into to save memory, rows of similar length grouped; the gradient is the same.",
        least=1,
        most=65536,
    )
    max_length: int = _option(
        256, "Tokens of a block of text; maximum tokens of an example of chat or choice.", least=2, most=2**20
    )
    low_bits: float | None = _option(
        None, "Lowest budget of training, bits per weight.", above=0, unset="the minimum of the formats"
    )
    high_bits: float | None = _option(
        None, "Highest budget of training, bits per weight.", above=0, unset="the maximum of the formats, up to 8.5"
    )
    learning_rate: float = _option(1e-3, "Peak learning rate of A.", above=0, most=100)
    rate_ratio: float | None = _option(
        None,
        "Peak learning rate of B over that of A (LoRA+, arXiv 2402.12354).",
        above=0,
        most=1e4,
        unset="4 with compensation, 1 without",
    )
    theta_rate: float = _option(1e-4, "Peak learning rate of the hypernetwork.", above=0, most=100)
    precision: Literal["float32", "bfloat16"] = _option(
        "float32", "Precision of the model's weights and products; the LoRA and its optimizer are always float32."
    )
    calibration: int | None = _option(
        None,
        "Blocks of text to calibrate on; of shorter examples as many as have the same number of tokens.",
        least=1,
        most=2**20,
        unset="16; for gptq, feedback and refined, four tokens for each input of the widest matrix",
    )
    evaluation: int | None = _option(
        None, "Held-out blocks (examples, questions) to measure on.", least=1, most=2**20, unset="16; for choice 200"
    )
    budgets: tuple[float, ...] | None = _option(
        None,
        "Average bits per weight at which the held-out loss is measured.",
        unset="those of 4, 5 and 6 that the formats allow, else the middle of their range",
    )
    checkpoint_every: int = _option(25, "Steps between checkpoints.", least=1, most=10**9)
    seed: int = _option(0, "Seed of initial values, batches and configurations.", least=0, most=2**32 - 1)

    def __post_init__(self) -> None:
        for text in self.formats:
            WeightFormat.parse(text)
        hints = get_type_hints(TrainOptions)
        for one in fields(self):
            value, most = getattr(self, one.name), one.metadata["most"]
            least, above = one.metadata["least"], one.metadata["above"]
            if value is None:
                continue
            if get_origin(hints[one.name]) is Literal and value not in get_args(hints[one.name]):
                allowed = ", ".join(get_args(hints[one.name]))
                raise ConfigError(f"unknown {one.name} {value!r}; allowed: {allowed}")
            if least is not None and value < least:
                raise ConfigError(f"{one.name} must be at least {least}, got {value}")
            if above is not None and not above < value < math.inf:
                raise ConfigError(f"{one.name} must be above {above:g} and finite, got {value}")
            if most < math.inf and not value <= most:
                raise ConfigError(f"{one.name} must be at most {most:.15g}, got {value}")
        for kind, rank in self.ranks:
            if not 1 <= rank <= _MAX_RANK:
                raise ConfigError(f"the rank of {kind} must be at least 1 and at most {_MAX_RANK}, got {rank}")
        if self.accumulate > self.batch:
            raise ConfigError(f"accumulate must be at most batch, {self.batch}, got {self.accumulate}")

    @property
    def rates(self) -> Mapping[str, float]:
        """Peak learning rate of each group of parameters: "A", "B", "theta", "scales"."""
        ratio = self.rate_ratio if self.rate_ratio is not None else 4.0 if self.compensation else 1.0
        return {
            "A": self.learning_rate,
            "B": ratio * self.learning_rate,
            "theta": self.theta_rate,
            "scales": _SCALES_RATE,
        }

    def rate(self, step: int) -> float:
        """Return the share of the peak learning rate at a step: a linear rise, then a cosine to zero."""
        rise = max(1, round(_WARMUP * self.steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))

    def measured_budgets(self, least: float, most: float) -> tuple[float, ...]:
        """Return the budgets at which the held-out loss is measured.

        Args:
            least: fewest bits per weight of a configuration.
            most: most bits per weight.
        """
        if self.budgets is not None:
            return self.budgets
        return tuple(bits for bits in _BUDGETS if least <= bits <= most) or ((least + most) / 2,)

    def held_out_limit(self, task: str) -> int:
        """Return the maximum number of held-out examples; an accuracy needs more of them than a loss."""
        if self.evaluation is not None:
            return self.evaluation
        return 200 if task == "choice" else 16


def _add_args(docstring: str) -> str:
    """Return the docstring of the class with the help of each option under Args."""
    summary, _, rest = docstring.partition("\n")
    entries = []
    for one in fields(TrainOptions):
        unset = one.metadata["unset"]
        entries.append(f"        {one.name}: {one.metadata['help']}{f' None: {unset}.' if unset else ''}")
    return "\n".join([summary, "\n    Args:", *entries, rest])


TrainOptions.__doc__ = _add_args(TrainOptions.__doc__ or "")
