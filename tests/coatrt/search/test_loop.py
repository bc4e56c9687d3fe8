"""The search on an objective that is known: prior costs with wrong biases, plus interactions between neighbours."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.errors import ConfigError
from coatrt.models.matrices import matrices_of
from coatrt.planning.archive import Archive, ArchiveEntry
from coatrt.quantization.weight_format import WeightFormat
from coatrt.search.loop import SearchOptions, search
from coatrt.search.surrogate import Surrogate, disturbed, fit_multipliers, multiplier_terms, predicted

pytestmark = pytest.mark.fast

FORMATS = tuple(map(WeightFormat.parse, ("nf2-g64", "nf3-g64", "int4-g64", "fp8", "int8")))
BASE = 3.0
Costs = dict[str, dict[str, float]]


def made_up(seed: int, layers: int = 8) -> tuple[ConfigSpace, Costs, Callable[[QuantConfig], float]]:
    """Return a space, prior costs, and a loss whose true costs have biases by kind, depth and format."""
    shapes = {"model.embed_tokens.weight": (64, 64)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{kind}_proj.weight": (64, 64) for kind in "qkvo"}
        shapes |= {f"{at}.mlp.{kind}_proj.weight": (192, 64) for kind in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (64, 192)}
    space, rng = ConfigSpace(matrices_of(shapes, tied=True), FORMATS), np.random.default_rng(seed)
    kinds, depths, formats = (np.exp(0.8 * rng.normal(size=size)) for size in (8, 3, 5))
    order = {kind: i for i, kind in enumerate(dict.fromkeys(matrix.kind for matrix in space.model.matrices))}
    costs: Costs = {}
    true: Costs = {}
    for m in space.model.matrices:
        own = rng.exponential() + 0.2
        costs[m.name] = {str(f): float(own * m.N * m.K / 4e4 / 4**f.bits) for f in FORMATS}
        bias = kinds[order[m.kind]] * depths[max(m.layer, 0) * 3 // layers]
        true[m.name] = {text: value * bias * formats[i] for i, (text, value) in enumerate(costs[m.name].items())}

    def loss(config: QuantConfig) -> float:
        names = space.model.names
        parts = np.array([true[name][str(config[name])] for name in names])
        return float(BASE + parts.sum() + 0.5 * (parts[1:] * parts[:-1]).sum())

    return space, costs, loss


def options(space: ConfigSpace, **changes: object) -> SearchOptions:
    return SearchOptions(**{"evaluations": 40, "reference": (space.max_bits, 9.0), "base": BASE, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
def test_it_beats_mutation_and_allocation_at_equal_evaluations(seed: int) -> None:
    space, costs, loss = made_up(seed)
    (true,) = (cell.cell_contents for cell in loss.__closure__ or () if isinstance(cell.cell_contents, dict))

    def volume(costs: Costs, method: str) -> float:
        archive = search(space, costs, loss, options(space, method=method, seed=seed))
        assert len({entry.config for entry in archive}) == len(archive) == 40  # nothing is measured twice
        return archive.hypervolume((space.max_bits, 9.0))

    ours, mutation, allocation = (volume(costs, method) for method in ("surrogate", "mutation", "allocation"))
    # As much is won over the prior's allocations as knowing the true costs would win.
    assert ours > allocation + 1.1 * (volume(true, "allocation") - allocation)
    assert ours > 1.01 * mutation


def test_it_starts_at_the_prior_with_both_ends_and_respects_budgets() -> None:
    space, costs, loss = made_up(0)
    archive = search(space, costs, loss, options(space, evaluations=20, low_bits=3.0, high_bits=6.0, lora_bytes=1000))
    extra = 8 * 1000 / space.model.parameters
    bits = np.array([archive.bits(entry) for entry in archive]) - extra
    assert (bits <= 6.0 + 1e-9).all()
    assert bits[:8].min() < 3.0 + 1e-9
    assert bits[:8].max() > 5.8
    assert archive.entries[0].nbytes == archive.entries[0].config.nbytes(space.model) + 1000


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    space, costs, loss = made_up(1)
    whole = search(space, costs, loss, options(space, evaluations=16, seed=4))
    path, parameters = tmp_path / "archive.json", space.model.parameters
    search(space, costs, loss, options(space, evaluations=11, seed=4), Archive(parameters, path))
    resumed = search(space, costs, loss, options(space, evaluations=16, seed=4), Archive.load(path))
    assert resumed.entries == whole.entries == Archive.load(path).entries
    other = search(space, costs, loss, options(space, evaluations=16, seed=5))
    assert other.entries[8:] != whole.entries[8:]


def test_a_new_round_measures_the_old_front_again() -> None:
    space, costs, loss = made_up(2)
    archive = search(space, costs, loss, options(space, evaluations=16))
    old = {entry.config for entry in archive.front()}
    search(space, costs, lambda config: loss(config) - 0.5, options(space, evaluations=12, round=1), archive)
    new = archive.current(1)
    assert len(new) == 12
    assert {entry.config for entry in new[:8]} <= old
    assert all(entry.loss == pytest.approx(loss(entry.config) - 0.5) for entry in new)


def test_a_small_space_is_measured_once_and_no_more() -> None:
    space, costs, loss = made_up(0, layers=1)
    two = ConfigSpace(space.model, FORMATS[:2])
    archive = search(two, costs, loss, options(two, evaluations=100, start=4))
    assert len({entry.config for entry in archive}) == len(archive) <= 2 ** len(two.groups)


def test_the_surrogate_learns_the_biases() -> None:
    space, costs, loss = made_up(3)
    from coatrt.planning.knapsack import cost_matrix

    rng = np.random.default_rng(0)
    surrogate = Surrogate(cost_matrix(space, costs), *multiplier_terms(space), BASE)
    column = {fmt: i for i, fmt in enumerate(FORMATS)}
    configs = [space.sample_budgeted(rng, float(bits)) for bits in rng.uniform(3, 7, 80)]
    choices = [np.array([column[config[group[0]]] for group in space.groups]) for config in configs]
    losses = [loss(config) for config in configs]
    fitted = fit_multipliers(surrogate, choices[:50], losses[:50])
    prior = np.concatenate([np.zeros(len(surrogate.spread)), [0.0, 1.0, 0.0]])

    def errors(theta: np.ndarray) -> np.ndarray:
        cost = disturbed(surrogate, theta)
        sums = np.array([cost[np.arange(len(choice)), choice].sum() for choice in choices[50:]])
        return np.log(predicted(surrogate, theta, sums) - BASE + 0.01) - np.log(np.array(losses[50:]) - BASE + 0.01)

    assert errors(fitted.mean).std() < 0.4 * errors(prior).std()
    assert abs(errors(fitted.mean).mean()) < 0.1
    covariance = fitted.root @ fitted.root.T
    draws = np.stack([fitted.draw(rng) for _ in range(4000)])
    assert np.allclose(draws.std(0), np.sqrt(np.diag(covariance)), rtol=0.1)
    assert (np.sqrt(np.diag(covariance))[:-3] <= surrogate.spread * (1 + 1e-6)).all()  # data never adds doubt


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluations": 0}, "evaluations 0 is given"),
        ({"start": 1}, "start 1 is given"),
        ({"method": "magic"}, "give surrogate, budgets, allocation, mutation"),
        ({"temperature": -1.0}, "give 0 or more"),
        ({"low_bits": 1.0}, "the formats allow"),
        ({"low_bits": 5.0, "high_bits": 4.0}, "choose a range inside"),
    ],
)
def test_wrong_options_are_refused(changes: dict[str, object], said: str) -> None:
    space, costs, loss = made_up(0)
    with pytest.raises(ConfigError, match=said):
        search(space, costs, loss, options(space, **changes))


def test_a_loss_that_is_not_finite_is_refused() -> None:
    space, costs, _ = made_up(0)
    archive = Archive(space.model.parameters)
    with pytest.raises(ConfigError, match="finite loss"):
        search(space, costs, lambda _: float("nan"), options(space), archive)
    assert not len(archive)
    assert ArchiveEntry(space.uniform("int8"), 1, 0.0).round == 0
