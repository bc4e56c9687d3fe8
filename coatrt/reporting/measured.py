"""What was measured of a bundle: NAME.quality.json and NAME.bench.json beside its directory NAME."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, TypedDict, TypeVar

from msgspec import Meta

from coatrt.bundle import Bundle
from coatrt.errors import ConfigError
from coatrt.evaluation.presentation import accuracy_text, perplexity_text
from coatrt.system.json_data import read_as, write_json
from coatrt.system.ranges import Count, Measure, Real

if TYPE_CHECKING:
    from coatrt.data.task_data import TaskData

__all__ = ["Bench", "Quality", "Score", "bench_path", "find_bench", "find_quality", "quality_path", "save_quality"]

_FORMAT = 1
_AGAIN = "measure the bundle again, or remove the file"

T = TypeVar("T")


class Score(TypedDict):
    """A held-out loss in nats per token, and for choice tasks the share of right answers."""

    loss: Annotated[float, Meta(ge=0, le=1e18)]
    accuracy: NotRequired[Annotated[float, Meta(ge=0, le=1)]]


@dataclass(frozen=True)
class Quality:
    """What a model's weights are worth on held-out data: as they were, compressed, and with the LoRA.

    Args:
        task: "text", "chat" or "choice".
        examples: blocks of text, conversations or questions it was measured on.
        tokens: predicted in them.
        base: of the original weights.
        quantized: of the quantized weights without a LoRA.
        adapted: of the quantized weights with their LoRA.

    Raises:
        ConfigError: only some of the scores have an accuracy, or a choice task has none.
    """

    task: Literal["text", "chat", "choice"]
    examples: Count
    tokens: Count
    base: Score
    quantized: Score
    adapted: Score

    def __post_init__(self) -> None:
        accuracies = {"accuracy" in score for score in (self.base, self.quantized, self.adapted)}
        if accuracies != {self.task == "choice"}:
            raise ConfigError("every score of a choice task needs an accuracy, and no score of another task has one")

    @property
    def sample(self) -> tuple[object, ...]:
        """What is equal for qualities that were measured on the same examples of the same model."""
        return self.task, self.examples, self.tokens, round(self.base["loss"], 6)

    @classmethod
    def of(
        cls, data: "TaskData", base: Mapping[str, float], quantized: Mapping[str, float], adapted: Mapping[str, float]
    ) -> "Quality":
        """Return the quality that `Evaluator.measure` found on the held-out examples of `data`."""
        scores: list[Any] = [dict(score) for score in (base, quantized, adapted)]
        examples = data.held_out if data.choices is None else data.choices
        return cls(data.kind, len(examples), data.held_out.target_count, *scores)

    def score_text(self, score: Score) -> str:
        """Return the accuracy of a score with its interval, or its perplexity."""
        if "accuracy" in score:
            return accuracy_text(score["accuracy"], self.examples)
        return perplexity_text(score["loss"])

    def text(self) -> str:
        """Return the quality as lines."""
        what = "perplexity" if self.task != "choice" else "accuracy, with its 95 % interval"
        unit = {"text": "blocks of text", "chat": "conversations", "choice": "questions"}[self.task]
        rows = (("16-bit original", self.base), ("quantized", self.quantized), ("with its LoRA", self.adapted))
        return "\n".join(
            [f"held-out {what}, {self.examples} {unit}, {self.tokens} tokens"]
            + [f"  {name:<16} {self.score_text(score):>8}" for name, score in rows]
        )


@dataclass(frozen=True)
class _QualityFile:
    """What NAME.quality.json holds: the quality, and the hashes of the two files of the bundle that decide it."""

    format: int
    weights: str
    lora: str
    quality: Quality


class _Configuration(TypedDict):
    configuration: str


class _Backend(TypedDict):
    backend: Literal["ort", "cuda", "trt"]
    batch: Count


class _Decode(TypedDict):
    lora: bool
    tokens_per_s: Measure


class _Machine(TypedDict):
    cpu: str
    gpus: list[str]


class Bench(TypedDict):
    """What a report reads of the JSON of `coatrt bench`."""

    bundle: _Configuration
    backend: _Backend
    decode: list[_Decode]
    environment: _Machine
    lora_overhead: Real
    lora_overhead_interval: tuple[Real, Real]
    repetitions: Count


def quality_path(directory: str | Path) -> Path:
    """Return where the quality of the bundle in `directory` is saved."""
    return _beside(Path(directory), "quality")


def bench_path(directory: str | Path) -> Path:
    """Return where a report looks for the benchmark of the bundle in `directory`."""
    return _beside(Path(directory), "bench")


def _beside(directory: Path, kind: str) -> Path:
    named = directory if directory.name not in ("", "..") else directory.absolute()
    return named.with_name(f"{named.name}.{kind}.json")


def save_quality(bundle: Bundle, quality: Quality) -> Path:
    """Write a measured quality beside its bundle, where `report` finds it, and return the file.

    Raises:
        ConfigError: the file cannot be written.
    """
    path = quality_path(bundle.directory)
    write_json(path, _QualityFile(_FORMAT, *_hashes(bundle), quality))
    return path


def _hashes(bundle: Bundle) -> tuple[str, str]:
    """Return the hashes of the weights and of the LoRA, empty for a file that the manifest does not name."""
    files: Mapping[str, Any] = bundle.manifest["files"]
    weights, lora = (files.get(name, {"sha256": ""})["sha256"] for name in ("weights.bin", "lora.safetensors"))
    return weights, lora


def find_quality(bundle: Bundle) -> tuple[Quality | None, str]:
    """Return the quality saved beside a bundle, and why it is left out where it is one of other weights.

    Raises:
        ConfigError: the file is damaged.
    """
    path = quality_path(bundle.directory)
    if not path.is_file():
        return None, ""
    file = read_as(path, _QualityFile, "measured quality", _AGAIN, version=_FORMAT)
    if (file.weights, file.lora) != _hashes(bundle):
        return None, f"{path.name} was measured with an earlier build of the bundle and is left out; measure it again"
    return file.quality, ""


def find_bench(bundle: Bundle) -> tuple[Bench | None, str]:
    """Return the benchmark saved beside a bundle, and why it is left out where it is one of another configuration.

    Raises:
        ConfigError: the file is damaged.
    """
    path = bench_path(bundle.directory)
    if not path.is_file():
        return None, ""
    found = read_as(path, Bench, "benchmark", _AGAIN)
    if found["bundle"]["configuration"] != bundle.manifest["configuration"]["hash"]:
        return None, f"{path.name} was measured with another configuration and is left out; measure it again"
    return found, ""
