"""The codes of a quantized checkpoint, kept beside its decoded weights in the conversion."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from coatrt.errors import CheckpointError, reason
from coatrt.models.conversion import ShardWriter
from coatrt.system.json_data import read_as, write_json

__all__ = ["StoredCodes", "write_codes"]

_FILE = "coatrt_codes.json"
_STEM = "codes"
_SHOWN = 2  # names of matrices in a line


@dataclass(frozen=True)
class StoredCodes:
    """Which matrices of a quantized checkpoint coatrt holds as stored, and what became of the others.

    Args:
        method: what wrote the checkpoint, such as "GPTQ".
        formats: matrix → text of the weight format that holds its codes.
        constants: matrix → factor of its scales, for nvfp4.
        rounded: matrices whose scales were rounded to float16.
        decoded: matrix → why no format holds its codes.
        notes: what the checkpoint asks for and coatrt leaves out.
        files: tensor → file, of the codes and scales.
    """

    method: str
    formats: Mapping[str, str]
    constants: Mapping[str, float]
    rounded: tuple[str, ...]
    decoded: Mapping[str, str]
    notes: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> "StoredCodes | None":
        """Read what a conversion holds; None: the model is not quantized.

        Raises:
            CheckpointError: it is damaged.
        """
        path = directory / _FILE
        if not path.is_file():
            return None
        codes = read_as(path, cls, "codes", "remove its directory to convert the model again", CheckpointError)
        if any(Path(name).name != name for name in codes.files.values()):
            raise CheckpointError(f"{path} names a file outside its directory; remove the directory")
        return codes

    def tensors(self, directory: Path, matrix: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes [N, K] and scales [N, blocks] of a matrix that has a format.

        Raises:
            CheckpointError: they are missing or damaged.
        """
        parts = []
        for name in (f"{matrix}.codes", f"{matrix}.scales"):
            file = directory / self.files.get(name, "")
            try:
                with safe_open(str(file), framework="pt") as shard:
                    parts.append(shard.get_tensor(name).clone())
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} cannot be read ({reason(error)}); remove {directory} to convert the model again"
                ) from None
        return parts[0], parts[1]

    @property
    def line(self) -> str:
        """What was kept, what was decoded and why, what is left out, as one line."""
        counts = ", ".join(f"{count} {fmt}" for fmt, count in Counter(self.formats.values()).most_common())
        parts = [f"{self.method} checkpoint: its codes are kept ({counts})" if counts else f"{self.method} checkpoint"]
        if self.rounded:
            parts.append(f"the scales of {_shown(self.rounded)} rounded to float16")
        for why in dict.fromkeys(self.decoded.values()):
            names = [name for name, other in self.decoded.items() if other == why]
            parts.append(f"{_shown(names)} decoded to 16 bits ({why})")
        return "; ".join([*parts, *self.notes])


def _shown(names: tuple[str, ...] | list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def write_codes(directory: Path, codes: StoredCodes, shards: ShardWriter) -> None:
    """Write a conversion's codes.

    Args:
        directory: directory of the conversion.
        codes: what it holds, without files.
        shards: the finished writer of codes and scales.
    """
    write_json(directory / _FILE, {**asdict(codes), "files": shards.weights})
