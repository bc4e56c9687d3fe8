"""The description of an adapter without its tensors: JSON files with checked hashes, read without torch in 0.1 s."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
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

ADAPTER_FORMAT = 9


def adapter_hash(directory: str | Path) -> str:
    """Return 16 hexadecimal digits that identify an adapter: its adapter.json has the hash of every file."""
    return sha256_file(Path(directory) / "adapter.json")[:16]


@dataclass(frozen=True)
class AdapterFile:
    """The content of adapter.json.

    Args:
        format: `ADAPTER_FORMAT`.
        coatrt: version of coatrt that wrote it.
        description: fields of `AdapterDescription`, without those in separate files.
        preset: preset of the hypernetwork.
        compensated: whether B has the compensation term.
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
            CheckpointError: it is missing, damaged or of another format.
        """
        path = directory / "adapter.json"
        restore(directory)
        if not path.is_file():
            if (directory / "training").is_dir():
                raise CheckpointError(
                    f"the training of adapter {directory} is not finished; continue it with coatrt train … --resume"
                )
            what = "exists but has no adapter.json" if directory.is_dir() else "does not exist"
            raise CheckpointError(f"adapter {directory} {what}; give the directory that coatrt train wrote")
        again = "copy it again, or train it again"
        return read_as(path, cls, "adapter", again, CheckpointError, version=ADAPTER_FORMAT, sealed=True)


@contextmanager
def adapter_reading(directory: Path, sha256: Mapping[str, str], names: Iterable[str]) -> Iterator[None]:
    """Check the hashes of files; errors inside the context become a CheckpointError.

    Args:
        directory: the adapter.
        sha256: name of a file → its hash.
        names: files to check.

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
    """Return the content of metrics.json; the values that coatrt reads are checked."""
    values = read_as(path, dict[str, Any], "training metrics", "train again")
    convert(values, Metrics, f"training metrics {path}", "train again")
    return values


@dataclass(frozen=True)
class AdapterDescription:
    """An adapter without its tensors, as planning needs it.

    Args:
        source: path or hub name of its model.
        fingerprint: fingerprint of the model's checkpoint.
        spec: specification of the model's decoder.
        space: matrices of the model and formats of the adapter.
        contract: names, shapes, ranks and scale of its LoRA tensors.
        sensitivity: costs and errors of every matrix in every format.
        metrics: options and losses of training.
        quantizer: quantizer of the weights in training, used in every bundle too.
        checkpoint_formats: matrix → format that a quantized checkpoint stores it in, see `Checkpoint.formats`; empty
            for a plain model.
        hash: identifies a saved adapter, see `adapter_hash`; empty if it was never saved.

    Raises:
        ConfigError: the quantizer is unknown.
        FormatError: a format of the checkpoint is unknown.
    """

    source: str
    fingerprint: str
    spec: DecoderSpec
    space: ConfigSpace
    contract: LoraContract
    sensitivity: Sensitivity
    metrics: Mapping[str, Any]
    quantizer: Quantizer = "mse"
    checkpoint_formats: Mapping[str, str] = field(default_factory=dict)
    hash: str = ""

    def __post_init__(self) -> None:
        if self.quantizer not in QUANTIZERS:
            raise ConfigError(f"no quantizer {self.quantizer!r}; allowed: {', '.join(QUANTIZERS)}")
        for text in self.checkpoint_formats.values():
            WeightFormat.parse(text)

    @property
    def own(self) -> dict[str, Any]:
        """The fields that adapter.json holds."""
        apart = ("sensitivity", "metrics", "hash")
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in apart}

    @property
    def model(self) -> ModelMatrices:
        """The matrices of the model."""
        return self.space.model

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        """The formats of the adapter, in the order of the hypernetwork's format ids."""
        return self.space.formats

    @property
    def lora_parameters(self) -> int:
        """Elements of the LoRA inputs of a graph: all A and B, and the zeros in block-diagonal B."""
        return sum(rows * columns for rows, columns in self.contract.inputs.values())

    @classmethod
    def load(cls, directory: str | Path) -> "AdapterDescription":
        """Read the JSON files of an adapter after checking their hashes.

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
