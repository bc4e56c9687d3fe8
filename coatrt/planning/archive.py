"""The archive: configurations and their measured losses, saved after every measurement."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from coatrt.adapter.description import adapter_hash
from coatrt.configs.config import QuantConfig
from coatrt.errors import ConfigError, FormatError
from coatrt.planning.pareto import hypervolume, pareto_indices
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.json_data import read_as, write_json
from coatrt.system.ranges import Bytes, Real

__all__ = ["ARCHIVE_FILE", "Archive", "ArchiveEntry", "adapter_archive"]

ARCHIVE_FILE = "archive.json"
"""Its name in an adapter's directory."""

_FORMAT = 5
_REMEDY = "remove it and search again (coatrt search)"


@dataclass(frozen=True)
class ArchiveEntry:
    """One measured configuration.

    Args:
        config: the configuration.
        nbytes: bytes of its matrices and of the adapter's LoRA in fp16.
        loss: held-out loss in nats per token, under the adapter.

    Raises:
        ConfigError: bytes below 1, or a loss that is not finite.
    """

    config: QuantConfig
    nbytes: int
    loss: float

    def __post_init__(self) -> None:
        if self.nbytes < 1 or not math.isfinite(self.loss):
            raise ConfigError(
                f"an archive entry needs positive bytes and a finite loss, got {self.nbytes} bytes and loss {self.loss}"
            )


class Archive:
    """Measured configurations, oldest first; the last measurement of a configuration counts.

    With a path, every `add` replaces the file atomically: a kill loses at most the current measurement.

    Args:
        parameters: weights in all matrices, the unit of bits per weight.
        path: JSON file, or None to stay in memory.
        identity: of the adapter and the held-out text; a file of another identity is refused.
    """

    def __init__(self, parameters: int, path: str | Path | None = None, identity: str = "") -> None:
        if parameters < 1:
            raise ConfigError(f"parameters must be at least 1, got {parameters}; give the model's number of weights")
        self.parameters, self.identity = parameters, identity
        self.path = Path(path) if path is not None else None
        self._entries: dict[QuantConfig, ArchiveEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[ArchiveEntry]:
        return iter(self.entries)

    @property
    def entries(self) -> tuple[ArchiveEntry, ...]:
        """All entries, oldest first."""
        return tuple(self._entries.values())

    def add(self, entry: ArchiveEntry) -> None:
        """Add a measurement and write the file."""
        self._entries[entry.config] = entry
        if self.path is not None:
            write_json(self.path, self._file(), sealed=True)

    def find(self, config: QuantConfig) -> ArchiveEntry | None:
        """Return the measurement of a configuration, None if it was not measured."""
        return self._entries.get(config)

    def bits(self, entry: ArchiveEntry) -> float:
        """Return bits per weight of an entry, LoRA included."""
        return 8 * entry.nbytes / self.parameters

    def points(self, entries: Sequence[ArchiveEntry]) -> list[tuple[float, float]]:
        """Return (bits per weight with the LoRA, loss) of entries."""
        return [(self.bits(entry), entry.loss) for entry in entries]

    def front(self) -> tuple[ArchiveEntry, ...]:
        """Return the entries on the front of bytes and loss, by ascending bytes."""
        return tuple(self.entries[i] for i in pareto_indices(self.points(self.entries)))

    def hypervolume(self, reference: tuple[float, float]) -> float:
        """Return the hypervolume over (bits, loss), see `coatrt.planning.pareto`."""
        return hypervolume(self.points(self.entries), reference)

    def _file(self) -> "_File":
        """Return the content of the file."""
        names = sorted(self.entries[0].config.formats) if self._entries else []
        formats = sorted({fmt for config in self._entries for fmt in config.formats.values()})
        column = {fmt: str(i) for i, fmt in enumerate(formats)}
        rows = tuple(
            (entry.nbytes, entry.loss, " ".join(column[entry.config[name]] for name in names)) for entry in self.entries
        )
        return _File(_FORMAT, self.identity, self.parameters, tuple(names), tuple(map(str, formats)), rows)

    @classmethod
    def load(cls, path: str | Path, identity: str | None = None) -> "Archive":
        """Return the archive in a file; `identity` None accepts any. Later measurements are written to the file.

        Raises:
            ConfigError: it is missing, damaged, or belongs to something else.
        """
        file = read_as(path, _File, "archive", _REMEDY, version=_FORMAT, sealed=True)
        try:
            archive = cls(file.parameters, path, file.identity)
            archive._entries = {entry.config: entry for entry in file.entries}
        except (ValueError, KeyError, ConfigError, FormatError) as error:
            raise ConfigError(f"archive {path} is garbled ({error}); {_REMEDY}") from None
        if identity is not None and archive.identity != identity:
            raise ConfigError(
                f"archive {path} was measured with another adapter or other text ({archive.identity}, now {identity}); "
                f"{_REMEDY}"
            )
        return archive

    @classmethod
    def open(cls, path: str | Path, parameters: int, identity: str) -> "Archive":
        """Return the archive in a file, or an empty one that is written there later.

        Raises:
            ConfigError: the file is damaged or belongs to something else.
        """
        return cls.load(path, identity) if Path(path).exists() else cls(parameters, path, identity)


@dataclass(frozen=True)
class _File:
    """The content of the file: names and formats once, a configuration as numbers."""

    format: int
    identity: str
    parameters: Bytes
    matrices: tuple[str, ...]
    formats: tuple[str, ...]
    rows: tuple[tuple[Bytes, Real, str], ...]  # bytes, loss, the number of each matrix's format

    @property
    def entries(self) -> Iterator[ArchiveEntry]:
        """The measurements.

        Raises:
            ValueError, KeyError, ConfigError, FormatError: a row is damaged.
        """
        formats = {str(i): WeightFormat.parse(text) for i, text in enumerate(self.formats)}
        for nbytes, loss, numbers in self.rows:
            choice = {name: formats[i] for name, i in zip(self.matrices, numbers.split(), strict=True)}
            yield ArchiveEntry(QuantConfig(choice), nbytes, loss)


def adapter_archive(directory: str | Path) -> Archive | None:
    """Return the archive in an adapter's directory, None if there is none.

    Raises:
        ConfigError: it is damaged, or was measured with another adapter.
    """
    path = Path(directory) / ARCHIVE_FILE
    if not path.exists():
        return None
    archive = Archive.load(path)
    if archive.identity.partition(" ")[0] != adapter_hash(directory):
        raise ConfigError(f"archive {path} was measured with another adapter; {_REMEDY}")
    return archive
