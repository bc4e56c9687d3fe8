"""The search loop: it measures allocations by predicted cost, at budgets in the widest gaps of the measured front.

The evaluator is a function configuration → loss, so nothing here depends on models. A proposal depends on the archive
alone, so an interrupted search continues with the same result.
"""

from collections.abc import Callable, Iterator
from itertools import chain, pairwise

import numpy as np

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.errors import ConfigError
from coatrt.planning.archive import Archive, ArchiveEntry
from coatrt.planning.knapsack import CostTable, cost_matrix, near_optimal
from coatrt.system.progress import Progress, silent

__all__ = ["extend_archive", "spread_allocations"]

_START = 8
_SHARES = (0.5, 0.25, 0.75)  # places in a gap to try: its middle, then its quarters


def extend_archive(
    space: ConfigSpace,
    costs: CostTable,
    evaluate: Callable[[QuantConfig], float],
    evaluations: int,
    archive: Archive | None = None,
    *,
    lora_bytes: int = 0,
    progress: Progress = silent,
) -> Archive:
    """Measure allocations until the archive has `evaluations` configurations, or no new one is left.

    First come allocations at eight budgets from the minimum to the maximum of bytes. Then, one at a time, comes the
    allocation in the middle of the widest gap of the measured front: that with the largest product of its neighbours'
    distances in bytes and in loss.

    Args:
        space: matrices and formats.
        costs: predicted cost by matrix and format, nats per token.
        evaluate: configuration → held-out loss, nats per token.
        evaluations: configurations in the archive at the end, including those measured before.
        archive: earlier measurements, extended in place; None: a new one in memory.
        lora_bytes: bytes of the adapter's LoRA in fp16, added to every configuration.
        progress: called after each measurement.

    Raises:
        ConfigError: fewer than one evaluation, or a loss is not finite.
    """
    if evaluations < 1:
        raise ConfigError(f"evaluations must be at least 1, got {evaluations}")
    archive = Archive(space.model.parameters) if archive is None else archive
    start = spread_allocations(space, costs, _START)
    while len(archive) < evaluations:
        proposals = chain(start, _in_gaps(space, costs, archive))
        config = next((config for config in proposals if archive.find(config) is None), None)
        if config is None:
            break
        entry = ArchiveEntry(config, config.nbytes(space.model) + lora_bytes, float(evaluate(config)))
        archive.add(entry)
        progress(len(archive), evaluations, "configurations", f"loss {entry.loss:.3f}")
    return archive


def spread_allocations(space: ConfigSpace, costs: CostTable, count: int) -> list[QuantConfig]:
    """Return allocations at evenly spread budgets, from the minimum to the maximum of a space's bytes."""
    price, size = cost_matrix(space, costs), space.sizes.astype(np.float64)
    budgets = np.linspace(size.min(1).sum(), size.max(1).sum(), count) + 0.5  # bytes are whole numbers
    return [space.config(near_optimal(price, size, budget)) for budget in budgets.tolist()]


def _in_gaps(space: ConfigSpace, costs: CostTable, archive: Archive) -> Iterator[QuantConfig]:
    """Yield allocations in the gaps of the measured front, widest first."""
    price, size, front = cost_matrix(space, costs), space.sizes.astype(np.float64), archive.front()
    areas = [(right.nbytes - left.nbytes) * (left.loss - right.loss) for left, right in pairwise(front)]
    for place in sorted(range(len(areas)), key=areas.__getitem__, reverse=True):
        low, high = (entry.config.nbytes(space.model) for entry in front[place : place + 2])
        for share in _SHARES:
            yield space.config(near_optimal(price, size, low + share * (high - low)))
