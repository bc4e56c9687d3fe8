"""Types of the values in an adapter's metrics.json that coatrt reads."""

from typing import Literal, NotRequired, TypedDict

from coatrt.system.ranges import Count, Integer, Measure, Real, Whole

__all__ = ["Metrics"]


class _Options(TypedDict):
    """The options of training that are read without `TrainOptions`."""

    quantizer: str
    preset: str
    rank: Count
    steps: Whole
    batch: Count
    max_length: Count
    seed: Integer
    precision: Literal["float32", "bfloat16"]


class _Budget(TypedDict):
    bits: Measure
    configuration: str
    without: Real
    adapted: Real
    without_accuracy: NotRequired[Measure]
    adapted_accuracy: NotRequired[Measure]


class _HeldOut(TypedDict):
    full_precision: Real
    full_precision_accuracy: NotRequired[Measure]
    budgets: list[_Budget]


class Metrics(TypedDict):
    """Options and losses of training; unknown keys of a later coatrt are ignored."""

    run: str
    options: _Options
    task: Literal["text", "chat", "choice"]
    dropped: Whole
    train_tokens: Whole
    held_out_examples: Whole
    held_out_tokens: Whole
    seconds: Measure
    losses: list[list[Real]]
    held_out: _HeldOut
