"""The search on an objective that is known: prior costs with wrong biases, plus interactions between neighbours."""

import itertools
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
from coatrt.searching.loop import extend_archive, spread_allocations

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


@pytest.mark.parametrize("seed", range(3))
def test_it_beats_random_and_spread_configurations_at_equal_evaluations(seed: int) -> None:
    space, costs, loss = made_up(seed)
    reference, rng = (space.max_bits, 9.0), np.random.default_rng(seed)
    archive = extend_archive(space, costs, loss, 40)
    assert len(archive) == 40
    spread, random = Archive(space.model.parameters), Archive(space.model.parameters)
    for config in spread_allocations(space, costs, 40):
        spread.add(ArchiveEntry(config, config.nbytes(space.model), loss(config)))
    while len(random) < 40:
        config = space.sample(rng, float(rng.uniform(space.min_bits, space.max_bits)))
        random.add(ArchiveEntry(config, config.nbytes(space.model), loss(config)))
    assert archive.hypervolume(reference) > spread.hypervolume(reference)
    assert archive.hypervolume(reference) > 1.01 * random.hypervolume(reference)


def test_it_starts_at_the_prior_with_both_ends() -> None:
    space, costs, loss = made_up(0)
    archive = extend_archive(space, costs, loss, 8, lora_bytes=1000)
    bits = [archive.bits(entry) - 8 * 1000 / space.model.parameters for entry in archive]
    assert bits[0] == pytest.approx(space.min_bits)
    assert bits[-1] == pytest.approx(space.max_bits)
    assert bits == sorted(bits)
    assert archive.entries[0].nbytes == archive.entries[0].config.nbytes(space.model) + 1000


def test_then_it_halves_the_widest_gap_of_the_front() -> None:
    """Around the largest product of distances in bytes and loss there is room for most hypervolume."""
    space, costs, loss = made_up(1)
    for count in range(8, 20):
        front = extend_archive(space, costs, loss, count, lora_bytes=500).front()
        new = extend_archive(space, costs, loss, count + 1, lora_bytes=500).entries[-1]
        gaps = [(b.nbytes - a.nbytes) * (a.loss - b.loss) for a, b in itertools.pairwise(front)]
        low, high = front[int(np.argmax(gaps))], front[int(np.argmax(gaps)) + 1]
        assert low.nbytes < new.nbytes <= (low.nbytes + high.nbytes) / 2


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    space, costs, loss = made_up(1)
    whole = extend_archive(space, costs, loss, 16)
    path, parameters = tmp_path / "archive.json", space.model.parameters
    extend_archive(space, costs, loss, 5, Archive(parameters, path))
    extend_archive(space, costs, loss, 11, Archive.load(path))
    resumed = extend_archive(space, costs, loss, 16, Archive.load(path))
    assert resumed.entries == whole.entries == Archive.load(path).entries


def test_a_small_space_is_measured_once_and_no_more() -> None:
    space, costs, loss = made_up(0, layers=1)
    measured: list[QuantConfig] = []
    two = ConfigSpace(space.model, FORMATS[:2])
    archive = extend_archive(two, costs, lambda config: measured.append(config) or loss(config), 100)  # type: ignore[func-returns-value]
    assert len(set(measured)) == len(measured) == len(archive) <= 2 ** len(two.groups)


def test_no_evaluations_and_a_loss_that_is_not_finite_are_refused() -> None:
    space, costs, loss = made_up(0)
    archive = Archive(space.model.parameters)
    with pytest.raises(ConfigError, match="finite loss"):
        extend_archive(space, costs, lambda _: float("nan"), 2, archive)
    assert not len(archive)
    with pytest.raises(ConfigError, match="evaluations must be at least 1, got 0"):
        extend_archive(space, costs, loss, 0)
