"""Search methods at equal evaluations: `coatrt search`, the same allocations at spread budgets, random mutation.

python benchmarks/search.py [--work DIR]

The model is a byte-level Llama of 8 layers (56 matrices, each free to take one of 7 formats), trained once on
presidential messages; no adapter; held-out loss of whole configurations, embedding in int8. Only mutation is random: it
has three seeds. Every run is a file in a folder of DIR, named after the model; a stopped one goes on.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, save_result
from predictor_costs import fisher_costs

sys.path.insert(0, str(Path(__file__).parent / "method"))
from micro import MicroOptions, micro_llama
from tasks import sotu

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import mean_loss
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.matrices import EMBEDDING, ModelMatrices
from coatrt.models.tokenizer import load_tokenizer
from coatrt.planning.archive import Archive, ArchiveEntry
from coatrt.planning.pareto import hypervolume
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.weight_format import WeightFormat
from coatrt.searching.loop import extend_archive, spread_allocations
from coatrt.system.files import atomic_file
from coatrt.system.json_data import read_as, write_json

FORMATS = ("nf2-g32", "nf3-g32", "nf4-g32", "int4-g32", "nvfp4", "fp8", "int8")
METHODS = {"mutation": 3, "spread": 1, "search": 1}
"""Seeds by method."""
NAMES = {"mutation": "random mutation", "spread": "spread budgets", "search": "coatrt search"}
EVALUATIONS, START = 60, 8
MODEL = MicroOptions(hidden=96, inner=256, layers=8, steps=400)
PLOT = Path(__file__).resolve().parents[1] / "docs" / "evidence" / "search.png"


class Problem:
    """Model, prior costs and the evaluator."""

    def __init__(self, directory: Path) -> None:
        checkpoint = Checkpoint.open(directory)
        codes, formats = CodeStore(checkpoint), tuple(map(WeightFormat.parse, FORMATS))
        # The embedding stays int8 and is not part of the space.
        self.space = ConfigSpace(ModelMatrices(checkpoint.matrices.targets, tied=True), formats, fused=False)
        data = sotu(load_tokenizer(checkpoint.directory), MODEL.length)
        train, held_out = data.train, data.held_out
        self.blocks = held_out[:: len(held_out) // 16][:16]
        self.model = FakeQuantModel(checkpoint, codes)
        calibration = train[:: len(train) // 16][:16]
        self.costs = fisher_costs(self.model, codes, calibration, formats)
        self.base = mean_loss(self.model, self.blocks)
        # A model that knows nothing has the loss log 256: nothing above is worth anything.
        self.reference = (self.space.max_bits, math.log(256))

    def evaluate(self, config: QuantConfig) -> float:
        """Return the held-out loss of a configuration."""
        self.model.set_config(QuantConfig({**config.formats, EMBEDDING: WeightFormat.parse("int8")}))
        return mean_loss(self.model, self.blocks, batch=16)


def mutant(space: ConfigSpace, archive: Archive, rng: np.random.Generator) -> QuantConfig:
    """Return a member of the front with other formats for one to four matrices."""
    front = archive.front()
    formats = dict(front[rng.integers(len(front))].config.formats)
    for name in rng.choice(space.model.names, size=int(rng.integers(1, 5)), replace=False):
        formats[str(name)] = space.formats[rng.integers(len(space.formats))]
    return QuantConfig(formats)


def explore(here: Problem, method: str, seed: int, archive: Archive) -> None:
    """Measure as many configurations as every method may."""

    def measure(config: QuantConfig) -> None:
        if archive.find(config) is None:
            archive.add(ArchiveEntry(config, config.nbytes(here.space.model), here.evaluate(config)))

    if method == "search":
        extend_archive(here.space, here.costs, here.evaluate, EVALUATIONS, archive)
        return
    for config in spread_allocations(here.space, here.costs, EVALUATIONS if method == "spread" else START):
        measure(config)
    tries = 0
    while method == "mutation" and len(archive) < EVALUATIONS:
        tries += 1
        measure(mutant(here.space, archive, np.random.default_rng([seed, len(archive), tries])))


def run(problem: Callable[[], Problem], work: Path, method: str, seed: int) -> dict[str, Any]:
    """Return the result of one run, done where it is not there yet."""
    path = work / f"{method}-{seed}.json"
    if not path.is_file():
        here, started = problem(), time.monotonic()
        archive = Archive.open(work / f"{method}-{seed}.archive.json", here.space.model.parameters, "search")
        explore(here, method, seed, archive)
        volumes, partial = [], Archive(here.space.model.parameters)
        for entry in archive:
            partial.add(entry)
            volumes.append(partial.hypervolume(here.reference))
        write_json(
            path,
            {
                "method": method,
                "seed": seed,
                "reference": here.reference,
                "base_loss": here.base,
                "hypervolume": volumes,
                "points": archive.points(archive.entries),
                "front": archive.points(archive.front()),
                "seconds": time.monotonic() - started,
            },
        )
        print(f"{method} {seed}: hypervolume {volumes[-1]:.4f}, {len(archive.front())} on the front", flush=True)
    return read_as(path, dict[str, Any], "run", "remove it")


def plot(runs: list[dict[str, Any]]) -> None:
    """Draw hypervolume by evaluations and the fronts of all runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for colour, method in zip(("tab:gray", "tab:blue", "tab:red"), METHODS, strict=True):
        for one in (found for found in runs if found["method"] == method):
            label = NAMES[method] if one["seed"] == 0 else None
            volumes = one["hypervolume"]
            left.plot(range(1, len(volumes) + 1), volumes, color=colour, label=label, linewidth=1)
            right.step(*zip(*one["front"], strict=True), where="post", color=colour, label=label, linewidth=1)
    top = max(found["hypervolume"][-1] for found in runs)
    left.set_ylim(0.97 * top, 1.002 * top)
    left.set_xlabel("configurations measured")
    left.set_ylabel("hypervolume, bits × nats")
    right.set_xlabel("bits per weight")
    right.set_ylabel("held-out loss, nats per byte")
    left.legend()
    right.legend()
    with atomic_file(PLOT) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def main() -> None:
    """Do what is missing of the runs, then write the result and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("out/search"), help="directory of finished runs")
    parser.add_argument("--plot", action="store_true", help="only draw the plot again, from the result")
    options = parser.parse_args()
    if options.plot:
        plot(read_as(RESULTS / "search.json", dict[str, Any], "result", "measure again")["runs"])
        return
    torch.set_num_threads(1)
    directory = micro_llama(MODEL)
    work = options.work / directory.name
    made: list[Problem] = []

    def problem() -> Problem:
        if not made:
            made.append(Problem(directory))
        return made[0]

    runs = [run(problem, work, method, seed) for method, seeds in METHODS.items() for seed in range(seeds)]
    table = {}
    union = hypervolume([point for found in runs for point in found["points"]], tuple(runs[0]["reference"]))
    for method in METHODS:
        ends = [found["hypervolume"][-1] for found in runs if found["method"] == method]
        table[method] = {
            "mean": statistics.mean(ends),
            "std": statistics.stdev(ends) if len(ends) > 1 else None,
            "runs": ends,
            "short_of_all": union - statistics.mean(ends),
        }
    save_result(
        "search",
        "python benchmarks/search.py",
        {
            "groups": 56,
            "formats": list(FORMATS),
            "evaluations": EVALUATIONS,
            "reference": runs[0]["reference"],
            "base_loss": runs[0]["base_loss"],
            "hypervolume": table,
            "runs": runs,
        },
    )
    plot(runs)


if __name__ == "__main__":
    main()
