"""Rank correlation of predictors with the measured held-out loss of 50 configurations of SmolLM2-135M.

python benchmarks/predictors.py [--quantizer refined|feedback|gptq] [--work DIR]

Half of the configurations are like a planner's choice (allocations under noisy costs of each gradient predictor in
turn), half are random maps of a budget; budgets from 2.5 to 8 bits. An interrupted run resumes: losses and costs are in
DIR.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import save_result, smollm2
from predictor_costs import fisher_costs, kfac_costs, measured_costs

sys.path.insert(0, str(Path(__file__).parent / "method"))
from tasks import sotu_documents

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.data.examples import Examples
from coatrt.data.text import text_task
from coatrt.evaluation.curvature import relative_errors, token_costs
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import mean_loss
from coatrt.models.tokenizer import load_tokenizer
from coatrt.planning.knapsack import cost_matrix
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.input_moments import Calibration
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.json_data import read_as, write_json
from coatrt.training.config_sampler import TrainingSampler

FORMATS = ("nf2-g64", "nf3-g64", "nf4-g64", "int4-g64", "nvfp4", "fp8", "int8")
GRADIENT = ("fisher", "kfac", "tokens")
LENGTH, MOMENTS, CALIBRATION, MEASURED, HELD_OUT, COUNT = 128, 32, 8, 2, 8, 50
LOW, HIGH = 2.5, 8.0

Costs = dict[str, dict[str, float]]


def spread(blocks: Examples, count: int) -> Examples:
    """Return `count` evenly spread blocks."""
    return blocks[:: len(blocks) // count][:count]


def cached(path: Path, make: Callable[[], Any]) -> Any:
    """Return the content of a file, created first if missing."""
    if not path.is_file():
        start = time.monotonic()
        write_json(path, {"value": make(), "seconds": time.monotonic() - start})
        print(f"{path.name}: {read_as(path, dict[str, Any], 'step', 'remove it')['seconds']:.0f} s", flush=True)
    return read_as(path, dict[str, Any], "step", "remove it")


def configurations(space: ConfigSpace, costs: Mapping[str, Costs]) -> list[tuple[str, QuantConfig]]:
    """Return (kind of draw, configuration), low and high budgets in turn."""
    rng = np.random.default_rng(0)
    budgets = rng.permutation(np.linspace(LOW, HIGH, COUNT // 2))
    draws = []
    for i, bits in enumerate(budgets):
        sampler = TrainingSampler(space, costs[GRADIENT[i % len(GRADIENT)]], LOW, HIGH)
        draws += [("allocated", sampler.plan_like(rng, float(bits))), ("random", space.sample(rng, bits))]
    return draws


def correlations(
    space: ConfigSpace, costs: Mapping[str, Costs], draws: list[tuple[str, QuantConfig]], losses: list[float]
) -> dict[str, dict[str, float]]:
    """Return Spearman's rank correlation of every predictor with the loss: over all, allocated, random."""
    from scipy.stats import spearmanr

    column = {fmt: i for i, fmt in enumerate(space.formats)}
    choices = [[column[config[group[0]]] for group in space.groups] for _, config in draws[: len(losses)]]
    kinds = np.array([kind for kind, _ in draws[: len(losses)]])
    measured = np.array(losses)
    correlations = {}
    predictions = {"bits": np.array([-config.average_bits(space.model) for _, config in draws[: len(losses)]])}
    for name, table in costs.items():
        price = cost_matrix(space, table)
        predictions[name] = np.array([price[np.arange(len(choice)), choice].sum() for choice in choices])
    for name, values in predictions.items():
        correlations[name] = {
            kind: float(spearmanr(values[subset], measured[subset]).statistic)
            for kind, subset in (
                ("all", kinds != ""),
                ("allocated", kinds == "allocated"),
                ("random", kinds == "random"),
            )
        }
    return correlations


def costs_of(
    model: FakeQuantModel, codes: CodeStore, space: ConfigSpace, calibration: Examples, work: Path
) -> dict[str, Any]:
    """Return name → {"value": costs, "seconds": …} of the costs from gradients."""
    args = (model, codes, calibration, space.formats)
    makers = {"fisher": fisher_costs, "kfac": kfac_costs, "tokens": token_costs}
    return {name: cached(work / f"{name}.json", partial(make, *args)) for name, make in makers.items()}


def losses_of(model: FakeQuantModel, draws: Sequence[tuple[str, QuantConfig]], blocks: Examples, path: Path) -> Any:
    """Return the held-out loss of every configuration, resuming from a file."""
    losses = read_as(path, list[float], "losses", "remove it") if path.is_file() else []
    for _, config in draws[len(losses) :]:
        model.set_config(config)
        losses.append(mean_loss(model, blocks))
        write_json(path, losses)
        bits = config.average_bits(model.checkpoint.matrices)
        print(f"{len(losses)} of {COUNT}: {bits:.2f} bits, loss {losses[-1]:.3f}", flush=True)
    model.set_config(None)
    return losses


def combined(costs: Mapping[str, Costs]) -> dict[str, Costs]:
    """Return combinations of costs."""
    # The first token may have massive activations and small gradients: E x² · E g² is then far from E x² g².
    return {
        "kfac, down_proj fisher": {
            name: costs["fisher" if name.endswith("down_proj") else "kfac"][name] for name in costs["kfac"]
        },
        "kfac × measured": {
            name: {text: (costs["kfac"][name][text] * max(value, 0.0)) ** 0.5 for text, value in row.items()}
            for name, row in costs["measured"].items()
        },
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quantizer", choices=("gptq", "feedback", "refined"), default="refined")
    parser.add_argument("--work", type=Path, default=Path("out/predictors"), help="directory of finished steps")
    arguments = parser.parse_args()
    work = arguments.work / arguments.quantizer
    torch.set_num_threads(1)  # on a shared machine two threads would wait for each other
    checkpoint = smollm2()
    space = ConfigSpace(checkpoint.matrices, tuple(map(WeightFormat.parse, FORMATS)))
    train, held_out = sotu_documents()
    data = text_task(load_tokenizer(checkpoint.directory), train, LENGTH, held_out=held_out)
    calibration, blocks = spread(data.train, CALIBRATION), spread(data.held_out, HELD_OUT)
    codes = CodeStore(checkpoint, arguments.quantizer, Calibration(spread(data.train, MOMENTS).tokens))
    model = FakeQuantModel(checkpoint, codes)
    errors = cached(work / "errors.json", lambda: relative_errors(model, codes, space.formats))["value"]
    steps = costs_of(model, codes, space, calibration, work)
    draws = configurations(space, {name: step["value"] for name, step in steps.items()})
    losses = losses_of(model, draws, blocks, work / "losses.json")
    base = cached(work / "base.json", lambda: mean_loss(model, blocks))["value"]
    steps["measured"] = cached(
        work / "measured.json", lambda: measured_costs(model, calibration[:MEASURED], space, errors)
    )
    costs = {name: step["value"] for name, step in steps.items()}
    result = {
        "quantizer": arguments.quantizer,
        "formats": list(FORMATS),
        "calibration_tokens": CALIBRATION * LENGTH,
        "measured_tokens": MEASURED * LENGTH,
        "held_out_tokens": HELD_OUT * LENGTH,
        "base_loss": base,
        "spearman": correlations(space, costs | combined(costs), draws, losses),
        "seconds": {name: step["seconds"] for name, step in steps.items()},
        "rows": [
            {"drawn": kind, "bits": config.average_bits(space.model), "configuration": config.hash, "loss": loss}
            for (kind, config), loss in zip(draws, losses, strict=True)
        ],
    }
    save_result("predictors", f"python benchmarks/predictors.py --quantizer {arguments.quantizer}", result)


if __name__ == "__main__":
    main()
