"""What an adapter is without its tensors: JSON files, hashes checked, read without torch in a tenth of a second."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from coatrt.adapter.metrics import Metrics
from coatrt.adapter.preset import Preset
from coatrt.configs.lora_contract import LoraContract
from coatrt.configs.space import ConfigSpace
from coatrt.errors import CheckpointError, ConfigError, FormatError, reason
from coatrt.evaluation.sensitivity_table import Sensitivity
from coatrt.models.matrices import ModelMatrices
from coatrt.models.spec import DecoderSpec
from coatrt.quantization.quantizers import QUANTIZERS, Quantizer
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.files import sha256_file
from coatrt.system.json_data import convert, read_as
from coatrt.system.scratch import restore

__all__ = ["ADAPTER_FORMAT", "AdapterDescription", "AdapterFile", "adapter_hash", "adapter_reading"]

ADAPTER_FORMAT = 7


def adapter_hash(directory: str | Path) -> str:
    """Return 16 digits that stand for every file of an adapter: adapter.json holds their hashes and its own."""
    return sha256_file(Path(directory) / "adapter.json")[:16]


@dataclass(frozen=True)
class AdapterFile:
    """What adapter.json holds.

    Args:
        format: `ADAPTER_FORMAT`.
        coatrt: version that wrote it.
        description: fields of `AdapterDescription`, without those that have a file of their own.
        preset: of the hypernetwork.
        compensated: whether B has the closed-form term.
        sha256: name of every other file → its hash.
    """

    format: int
    coatrt: str
    description: Mapping[str, Any]
    preset: Preset
    compensated: bool
    sha256: Mapping[str, str]

    @classmethod
    def load(cls, directory: Path) -> "AdapterFile":
        """Read adapter.json.

        Raises:
            CheckpointError: there is none, or it is damaged or of another format.
        """
        path = directory / "adapter.json"
        restore(directory)
        if not path.is_file():
            what = "exists but has no adapter.json" if directory.is_dir() else "does not exist"
            raise CheckpointError(f"adapter {directory} {what}; give the directory that coatrt train wrote")
        again = "copy it again, or train it again"
        return read_as(path, cls, "adapter", again, CheckpointError, version=ADAPTER_FORMAT, sealed=True)


@contextmanager
def adapter_reading(directory: Path, sha256: Mapping[str, str], names: Iterable[str]) -> Iterator[None]:
    """Check the hashes of files; what goes wrong inside is one CheckpointError.

    Args:
        directory: the adapter.
        sha256: name of a file → its hash.
        names: files that will be read.

    Raises:
        CheckpointError: a file is missing, altered or damaged.
    """
    try:
        for name in names:
            if sha256_file(directory / name) != sha256[name]:
                raise CheckpointError(f"{directory / name} was altered or is damaged; copy or train the adapter again")
        yield
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} is a damaged adapter ({reason(error)}); copy or train it again") from None
    except (ConfigError, FormatError) as error:
        raise CheckpointError(f"{directory} is a damaged adapter: {error}") from None


def _metrics(path: Path) -> dict[str, Any]:
    """Return all that metrics.json holds, what is read from it checked."""
    values = read_as(path, dict[str, Any], "training metrics", "train again")
    convert(values, Metrics, f"training metrics {path}", "train again")
    return values


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
    def own(self) -> dict[str, Any]:
        """The fields that adapter.json holds."""
        apart = ("sensitivity", "metrics", "hash")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in apart}

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
        """Elements of the LoRA inputs of a graph: all A and B, and the zeros between those that share an input."""
        return sum(rows * columns for rows, columns in self.contract.inputs.values())

    @classmethod
    def load(cls, directory: str | Path) -> "AdapterDescription":
        """Read the JSON files of an adapter, the hash of each checked first.

        Raises:
            CheckpointError: it is missing, unfinished, damaged, or of another format.
        """
        directory = Path(directory)
        file = AdapterFile.load(directory)
        with adapter_reading(directory, file.sha256, ("sensitivity.json", "metrics.json")):
            files = {
                "sensitivity": read_as(directory / "sensitivity.json", Sensitivity, "sensitivities", "train again"),
                "metrics": _metrics(directory / "metrics.json"),
                "hash": adapter_hash(directory),
            }
            where = f"the description in {directory / 'adapter.json'}"
            return convert({**file.description, **files}, cls, where, "train it again", CheckpointError)
