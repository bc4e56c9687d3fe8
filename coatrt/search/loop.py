"""Pareto search over (bits, loss): which configurations to measure next, learned from those measured already.

The evaluator is a function configuration → loss, so nothing here knows models. A proposal depends on the seed and
the archive alone: a search that was interrupted goes on as if it had not been.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.errors import ConfigError
from coatrt.planning.archive import Archive, ArchiveEntry
from coatrt.planning.knapsack import CostTable, cost_matrix, near_optimal_each
from coatrt.planning.pareto import hypervolume
from coatrt.search.surrogate import Surrogate, disturbed, fit_multipliers, multiplier_terms, predicted
from coatrt.system.progress import Progress, silent

__all__ = ["Method", "SearchOptions", "propose", "search"]

Method = Literal["surrogate", "budgets", "allocation", "mutation"]
_BUDGETS = 40  # budgets looked at for each proposal
_LEARNED_TRIES = 3  # of the surrogate before a random mutation stands in
_TRIES = 50  # other proposals in place of a configuration measured already


@dataclass(frozen=True)
class SearchOptions:
    """How a search goes.

    Args:
        evaluations: configurations measured in this round, those in the archive counted.
        reference: (bits per weight with the LoRA, loss): the worst that is worth anything, for the hypervolume.
        base: loss of the unquantized model, nats per token.
        low_bits: lowest budget, bits per weight without the LoRA; None: the least the formats allow.
        high_bits: highest budget; None: the most they allow.
        start: allocations by the prior costs, spread over the budgets, that are measured first.
        method: "surrogate", or for comparison "budgets" (the same with all multipliers held at 1: only budgets are
            chosen), "allocation" (prior costs at budgets spread ever more finely) or "mutation" (random moves of front
            members).
        temperature: how far sampled multipliers deviate from their mean in every other proposal.
        lora_bytes: bytes of the adapter's LoRA in fp16, counted with every configuration.
        round: which adapter the losses are measured with.
        seed: of the proposals.

    Raises:
        ConfigError: a value out of range.
    """

    evaluations: int
    reference: tuple[float, float]
    base: float
    low_bits: float | None = None
    high_bits: float | None = None
    start: int = 8
    method: Method = "surrogate"
    temperature: float = 0.5
    lora_bytes: int = 0
    round: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("evaluations", 1), ("start", 2), ("lora_bytes", 0), ("round", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} {getattr(self, name)} is given; give at least {least}")
        if self.method not in get_args(Method):
            raise ConfigError(f"search method {self.method!r} is given; give {', '.join(get_args(Method))}")
        if self.temperature < 0:
            raise ConfigError(f"temperature {self.temperature} is given; give 0 or more")

    def budgets(self, space: ConfigSpace) -> tuple[float, float]:
        """Return the lowest and highest budget in bytes of the matrices.

        Raises:
            ConfigError: the range is empty or outside of what the formats allow.
        """
        low = space.min_bits if self.low_bits is None else self.low_bits
        high = space.max_bits if self.high_bits is None else self.high_bits
        if not space.min_bits - 1e-9 <= low < high <= space.max_bits + 1e-9:
            raise ConfigError(
                f"search budgets of {low:g} to {high:g} bits are given; the formats allow {space.min_bits:.3f} to "
                f"{space.max_bits:.3f}; choose a range inside"
            )
        return low * space.model.parameters / 8, high * space.model.parameters / 8


def search(
    space: ConfigSpace,
    costs: CostTable,
    evaluate: Callable[[QuantConfig], float],
    options: SearchOptions,
    archive: Archive | None = None,
    progress: Progress = silent,
) -> Archive:
    """Measure configurations until the archive holds as many of this round as asked for.

    Args:
        space: matrices and formats.
        costs: prior cost by matrix and format, nats per token.
        evaluate: configuration → held-out loss, nats per token.
        options: how.
        archive: what was measured before, and where more is written; a new one in memory if not given.
        progress: called after each measurement.

    Raises:
        ConfigError: options do not fit the space, or a loss is not finite.
    """
    archive = Archive(space.model.parameters) if archive is None else archive
    problem = _Problem(space, costs, options)
    while (done := len(archive.current(options.round))) < options.evaluations:
        config = propose(problem, archive)
        if config is None:
            break
        size = config.nbytes(space.model) + options.lora_bytes
        entry = ArchiveEntry(config, size, float(evaluate(config)), options.round)
        archive.add(entry)
        progress(done + 1, options.evaluations, "configurations", f"loss {entry.loss:.3f}")
    return archive


class _Problem:
    """The space in arrays, made once per search."""

    def __init__(self, space: ConfigSpace, costs: CostTable, options: SearchOptions) -> None:
        self.space, self.options = space, options
        self.cost = cost_matrix(space, costs)
        self.sizes = space.sizes.astype(np.float64)
        self.low, self.high = options.budgets(space)
        terms, spread = multiplier_terms(space)
        held = 1e-6 if options.method == "budgets" else 1.0
        self.surrogate = Surrogate(self.cost, terms, held * spread, options.base)
        self._column = {fmt: i for i, fmt in enumerate(space.formats)}
        self.spread = self.allocations(self.cost, np.linspace(0, 1, options.start))

    def choice(self, config: QuantConfig) -> NDArray[np.int64]:
        """Return the format number of every group."""
        return np.array([self._column[config[group[0]]] for group in self.space.groups])

    def allocations(self, cost: NDArray[np.float64], shares: Iterable[float]) -> list[NDArray[np.int64]]:
        """Return the near-optimal choices under costs at budgets so far between the lowest and the highest."""
        least = float(self.sizes.min(1).sum())
        limits = [max(self.low + share * (self.high - self.low), least) + 0.5 for share in shares]
        return near_optimal_each(cost, self.sizes, limits)

    def point(self, choice: NDArray[np.int64]) -> float:
        """Return bits per weight with the LoRA."""
        size = self.sizes[np.arange(len(choice)), choice].sum() + self.options.lora_bytes
        return float(8 * size / self.space.model.parameters)


def propose(problem: _Problem, archive: Archive) -> QuantConfig | None:
    """Return the configuration to measure next, None where no new one is left.

    First the stale front of an earlier round, then spread allocations, then the method's own.
    """
    options = problem.options
    current = archive.current(options.round)
    known = {entry.config.hash for entry in current}
    for entry in _stale(archive, options):
        if entry.config.hash not in known and problem.space.contains(entry.config):
            return entry.config
    rng = np.random.default_rng([options.seed, options.round, len(current)])
    if len(current) < 2 * options.start:
        for choice in problem.spread:
            config = problem.space.config(choice)
            if config.hash not in known:
                return config
    for attempt in range(_TRIES):
        if options.method == "allocation":
            choice = _spread(problem, len(current) + attempt, options)
        elif options.method == "mutation" or attempt >= _LEARNED_TRIES:
            choice = _mutant(problem, archive, rng)
        else:
            choice = _learned(problem, archive, rng, known)
        config = problem.space.config(choice)
        if config.hash not in known:
            return config
    return None


def _stale(archive: Archive, options: SearchOptions) -> tuple[ArchiveEntry, ...]:
    """Return at most `start` front members of the last earlier round, evenly over the budgets."""
    earlier = [entry.round for entry in archive if entry.round < options.round]
    if not earlier:
        return ()
    front = archive.front(max(earlier))
    picked = np.unique(np.linspace(0, len(front) - 1, options.start).round().astype(int))
    return tuple(front[i] for i in picked)


def _spread(problem: _Problem, number: int, options: SearchOptions) -> NDArray[np.int64]:
    """Return the prior's allocation at the next budget of a van der Corput sequence, shifted by the seed."""
    share, base, rest = 0.0, 0.5, number
    while rest:
        share, rest, base = share + base * (rest % 2), rest // 2, base / 2
    shift = np.random.default_rng(options.seed).random()
    return problem.allocations(problem.cost, [float((share + shift) % 1.0)])[0]


def _mutant(problem: _Problem, archive: Archive, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return a front member with one to four groups given other formats, within the budgets where that is possible."""
    front = archive.front(problem.options.round)
    for _ in range(20):
        choice = problem.choice(front[rng.integers(len(front))].config)
        for row in rng.choice(len(choice), size=min(len(choice), int(rng.integers(1, 5))), replace=False):
            choice[row] = rng.integers(problem.sizes.shape[1])
        size = problem.sizes[np.arange(len(choice)), choice].sum()
        if problem.low <= size + 0.5 and size <= problem.high + 0.5:
            break
    return choice


def _learned(problem: _Problem, archive: Archive, rng: np.random.Generator, known: set[str]) -> NDArray[np.int64]:
    """Return the allocation, under multipliers fitted to the archive, that would add most hypervolume.

    Even proposals take the multipliers' mean, odd ones a sample (Thompson): its allocations at many budgets, the losses
    it predicts for them, and of these the one whose point would enlarge the front's hypervolume most.
    """
    options, entries = problem.options, archive.current(problem.options.round)
    # An adapter may beat the unquantized model it was trained on: then the least loss seen is the floor.
    surrogate = replace(problem.surrogate, base=min(options.base, *(entry.loss for entry in entries)))
    fitted = fit_multipliers(surrogate, [problem.choice(e.config) for e in entries], [e.loss for e in entries])
    theta = fitted.draw(rng, options.temperature if len(entries) % 2 else 0.0)
    cost = disturbed(surrogate, theta)
    shares = (np.arange(_BUDGETS) + rng.random(_BUDGETS)) / _BUDGETS
    choices = problem.allocations(cost, shares)
    rows = np.arange(len(cost))
    losses = predicted(surrogate, theta, np.array([cost[rows, choice].sum() for choice in choices]))
    front = archive.points(archive.front(options.round))
    before = hypervolume(front, options.reference)
    best, most = choices[int(rng.integers(len(choices)))], 0.0
    for choice, loss in zip(choices, losses, strict=True):
        gain = hypervolume([*front, (problem.point(choice), float(loss))], options.reference) - before
        if gain > most and problem.space.config(choice).hash not in known:
            best, most = choice, gain
    return best
