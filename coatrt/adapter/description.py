"""What an adapter is without its tensors: JSON files, hashes checked, read without torch in a tenth of a second."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from coatrt import __version__
from coatrt.configs.lora_contract import LoraContract
from coatrt.configs.space import ConfigSpace
from coatrt.errors import CheckpointError, ConfigError, FormatError
from coatrt.evaluation.sensitivity_table import Sensitivity
from coatrt.models.matrices import ModelMatrices
from coatrt.models.spec import DecoderSpec
from coatrt.quantization.quantizers import QUANTIZERS, Quantizer
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.files import read_json, sha256_file

__all__ = ["ADAPTER_FORMAT", "AdapterDescription", "adapter_hash", "adapter_reading", "read_description"]

ADAPTER_FORMAT = 4


def adapter_hash(directory: str | Path) -> str:
    """Return 16 digits that stand for every file of an adapter: adapter.json holds their hashes."""
    return sha256_file(Path(directory) / "adapter.json")[:16]


def read_description(directory: Path) -> dict[str, Any]:
    """Return the content of an adapter's adapter.json.

    Raises:
        CheckpointError: there is none, it is of another format, or it names no hashes.
    """
    path = directory / "adapter.json"
    if not path.is_file():
        what = "exists but has no adapter.json" if directory.is_dir() else "does not exist"
        raise CheckpointError(f"adapter {directory} {what}; give the directory that coatrt train wrote")
    try:
        facts = read_json(path, "adapter description")
    except ConfigError as error:
        raise CheckpointError(f"{error}; train the adapter again") from None
    if not isinstance(facts, dict) or facts.get("format") != ADAPTER_FORMAT:
        given = facts.get("format") if isinstance(facts, dict) else None
        raise CheckpointError(
            f"{directory} has adapter format {given}, coatrt {__version__} reads {ADAPTER_FORMAT}; train it again"
        )
    if not isinstance(facts.get("sha256"), dict):
        raise CheckpointError(f"{path} names no hashes; copy or train the adapter again")
    return facts


@contextmanager
def adapter_reading(directory: Path, facts: Mapping[str, Any], names: Iterable[str]) -> Iterator[None]:
    """Check the hashes of files; what goes wrong inside is one CheckpointError.

    Args:
        directory: the adapter.
        facts: content of its adapter.json, see `read_description`.
        names: files that will be read.

    Raises:
        CheckpointError: a file is missing, altered or damaged.
    """
    try:
        for name in names:
            if sha256_file(directory / name) != facts["sha256"][name]:
                raise CheckpointError(f"{directory / name} was altered or is damaged; copy or train the adapter again")
        yield
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{directory} is a damaged adapter ({reason}); copy or train it again") from None
    except (ConfigError, FormatError) as error:
        raise CheckpointError(f"{directory} is a damaged adapter: {error}") from None


@dataclass(frozen=True)
class AdapterDescription:
    """An adapter without its tensors: all that planning needs.

    Args:
        source: path or hub name of the model it was trained on.
        fingerprint: of that model's checkpoint.
        spec: what that model computes.
        space: its matrices and the formats the adapter was trained for.
        contract: names, shapes, ranks and scale of its LoRA tensors.
        sensitivity: costs and errors of every matrix in every format.
        metrics: options and losses of the training.
        quantizer: how the weights it was trained on were encoded; every bundle of it uses the same.
        hash: stands for every file of a saved adapter; empty for one that was never saved.

    Raises:
        ConfigError: the quantizer is unknown.
    """

    source: str
    fingerprint: str
    spec: DecoderSpec
    space: ConfigSpace
    contract: LoraContract
    sensitivity: Sensitivity
    metrics: Mapping[str, Any]
    quantizer: Quantizer = "mse"
    hash: str = ""

    def __post_init__(self) -> None:
        if self.quantizer not in QUANTIZERS:
            raise ConfigError(f"no quantizer {self.quantizer!r}; allowed: {', '.join(QUANTIZERS)}")

    @property
    def model(self) -> ModelMatrices:
        """The matrices of the model."""
        return self.space.model

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        """The formats the adapter was trained for; the hypernetwork's input counts in this order."""
        return self.space.formats

    @property
    def lora_parameters(self) -> int:
        """Elements of all A and B."""
        return sum(rows * columns for rows, columns in self.contract.shapes.values())

    def to_json(self) -> dict[str, Any]:
        """Return what adapter.json holds of it; sensitivity and metrics have files of their own."""
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "decoder": self.spec.to_json(),
            "model": self.model.to_json(),
            "formats": [str(fmt) for fmt in self.formats],
            "fused": self.space.fused,
            "contract": self.contract.to_json(),
            "quantizer": self.quantizer,
        }

    @classmethod
    def load(cls, directory: str | Path) -> "AdapterDescription":
        """Read the JSON files of an adapter, the hash of each checked first.

        Raises:
            CheckpointError: it is missing, unfinished, damaged, or of another format.
        """
        directory = Path(directory)
        facts = read_description(directory)
        with adapter_reading(directory, facts, ("sensitivity.json", "metrics.json")):
            formats = tuple(WeightFormat.parse(text) for text in facts["formats"])
            return cls(
                source=str(facts["source"]),
                fingerprint=str(facts["fingerprint"]),
                spec=DecoderSpec.from_json(facts["decoder"]),
                space=ConfigSpace(ModelMatrices.from_json(facts["model"]), formats, bool(facts["fused"])),
                contract=LoraContract.from_json(facts["contract"]),
                sensitivity=Sensitivity.load(directory / "sensitivity.json"),
                metrics=read_json(directory / "metrics.json", "training metrics"),
                quantizer=facts["quantizer"],
                hash=adapter_hash(directory),
            )
