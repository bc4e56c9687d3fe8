"""Pins: matrices whose format the user fixes (`--keep lm_head=int8`)."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.config import matching_names
from coatrt.configs.space import ConfigSpace
from coatrt.devices.profiles import DeviceProfile
from coatrt.errors import ConfigError
from coatrt.models.matrices import EMBEDDING, HEAD, ModelMatrices
from coatrt.quantization.weight_format import WeightFormat

__all__ = ["CHECKPOINT", "matched", "pinned_costs"]

CHECKPOINT = "checkpoint"
"""In place of a format: the one that a quantized checkpoint stores a matrix in."""


def matched(model: ModelMatrices, pattern: str) -> tuple[str, ...]:
    """Return the matrices that a name, a module kind or a glob over whole names matches.

    The head of a model that ties it is its embedding.

    Raises:
        ConfigError: nothing matches.
    """
    if pattern == HEAD and model.tied:
        return (EMBEDDING,)
    if pattern in model.by_name:
        return (pattern,)
    kinds = tuple(matrix.name for matrix in model.matrices if matrix.kind == pattern)
    if kinds:
        return kinds
    return matching_names(pattern, model, "--keep takes a name, a kind like down_proj, or a glob like *.mlp.*")


def pinned_costs(
    space: ConfigSpace,
    cost: NDArray[np.float64],
    keep: Iterable[Sequence[str]],
    device: DeviceProfile,
    stored: Mapping[str, str] | None = None,
) -> NDArray[np.float64]:
    """Return costs [groups, formats] that are infinite where a pin forbids a format.

    A later pin beats an earlier one on the same matrix. A pin on one matrix of a fused group pins the group.

    Args:
        space: groups and formats of the device.
        cost: costs without pins.
        keep: (pattern, format text), see `matched`; "checkpoint" is the format in `stored`.
        device: for messages.
        stored: matrix → format that a quantized checkpoint stores it in.

    Raises:
        ConfigError: a pattern matches nothing, a format is not in the space, or two pins disagree on a group.
        FormatError: an unknown format.
    """
    pins: dict[str, WeightFormat] = {}
    for pattern, text in keep:
        names = matched(space.model, pattern)
        chosen = _of_checkpoint(pattern, names, stored or {}) if text == CHECKPOINT else dict.fromkeys(names, text)
        for name, own in chosen.items():
            pinned = WeightFormat.parse(own)
            if pinned not in space.formats:
                given = text if own == text else f"{text}, {own} of {name}"
                raise ConfigError(
                    f"--keep {pattern}={given}: the format must be one of {', '.join(map(str, space.formats))} "
                    f"for {device.id} and this adapter"
                )
            pins[name] = pinned
    if not pins:
        return cost
    cost = cost.copy()
    for row, group in enumerate(space.groups):
        formats = {pins[name] for name in group if name in pins}
        if len(formats) > 1:
            raise ConfigError(
                f"--keep gives the fused group of {group[0]} the formats {' and '.join(sorted(map(str, formats)))}; "
                "one kernel reads the group: give it one format"
            )
        for fmt in formats:
            cost[row, [column for column, other in enumerate(space.formats) if other != fmt]] = np.inf
    return cost


def _of_checkpoint(pattern: str, names: Sequence[str], stored: Mapping[str, str]) -> dict[str, str]:
    """Return matrix → format that the checkpoint stores it in."""
    formats = {name: stored[name] for name in names if name in stored}
    if not formats:
        raise ConfigError(
            f"--keep {pattern}={CHECKPOINT}: the adapter's model does not store {names[0]} quantized or in 16 bits; "
            "give a format"
        )
    return formats
