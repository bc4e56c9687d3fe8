"""Time of allocations and their distance from the proven bound: SmolLM2's shapes, 210 free matrices, 12 formats.

python benchmarks/allocation.py

Costs are exponential draws over 4^bits, new for every seed; also costs that grow with the size of the matrix, and costs
without an order of formats. Needs no model.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from common import save_result

from coatrt.configs.space import ConfigSpace
from coatrt.models.matrices import ModelMatrices, matrices_of
from coatrt.planning.candidates import candidates
from coatrt.planning.knapsack import cost_matrix, lagrangian_choice, near_optimal
from coatrt.quantization.weight_format import WeightFormat

FORMATS = (
    "nf2-g64",
    "nf2-g32",
    "nf3-g64",
    "nf3-g32",
    "nf4-g64",
    "nf4-g32",
    "int4-g64",
    "int4-g32",
    "nvfp4",
    "fp8",
    "int8",
    "fp16",
)
BUDGETS, SEEDS = 40, 3


def shapes() -> ModelMatrices:
    """Return the 210 linear matrices of SmolLM2-135M (and a token-sized embedding, which every model has)."""
    shapes = {"model.embed_tokens.weight": (64, 64)}
    for layer in range(30):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.{kind}_proj.weight": (rows, 576)
            for kind, rows in (("q", 576), ("k", 192), ("v", 192), ("o", 576))
        }
        shapes |= {f"{at}.mlp.gate_proj.weight": (1536, 576), f"{at}.mlp.up_proj.weight": (1536, 576)}
        shapes |= {f"{at}.mlp.down_proj.weight": (576, 1536)}
    whole = matrices_of(shapes, tied=True)
    return ModelMatrices(whole.targets, tied=True)


def tables(space: ConfigSpace, kind: str, seed: int) -> dict[str, dict[str, float]]:
    """Return costs of one kind: "ordered" (fewer bits cost more), "sized" (by size too), "unordered"."""
    rng = np.random.default_rng(seed)
    costs_by_name = {}
    for matrix in space.model.matrices:
        scale = rng.exponential() * (matrix.N * matrix.K / 1e6 if kind == "sized" else 1.0)
        costs_by_name[matrix.name] = {
            str(fmt): float(
                scale * rng.exponential() / (1.0 if kind == "unordered" else 4 ** fmt.bits_per_weight(matrix.K))
            )
            for fmt in space.formats
        }
    return costs_by_name


def main() -> None:
    """Time every way to allocate, and write the result."""
    space = ConfigSpace(shapes(), tuple(map(WeightFormat.parse, FORMATS)), fused=False)
    size, rows = space.sizes.astype(float), np.arange(len(space.groups))
    least, most = float(size.min(1).sum()), float(size.max(1).sum())
    budgets = [least + share * (most - least) + 0.5 for share in np.linspace(0.02, 1.0, BUDGETS)]
    seconds: dict[str, list[float]] = {"candidates": [], "near_optimal": []}
    above: dict[str, list[float]] = {name: [] for name in seconds}

    def timed(name: str, allocate: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        choice = allocate()
        seconds[name].append(time.perf_counter() - start)
        return choice

    for kind in ("ordered", "sized", "unordered"):
        for seed in range(SEEDS):
            price = cost_matrix(space, tables(space, kind, seed))
            every = timed("candidates", partial(candidates, space, price))
            sizes, prices = size[rows, every].sum(1), price[rows, every].sum(1)
            for budget in budgets:
                floor = lagrangian_choice(price, size, budget)[1]
                one = timed("near_optimal", partial(near_optimal, price, size, budget))
                values = (prices[sizes <= budget].min(), price[rows, one].sum())
                for name, value in zip(seconds, values, strict=True):
                    above[name].append(float(value / floor - 1))
    result = {
        "groups": len(space.groups),
        "formats": len(FORMATS),
        "budgets": BUDGETS,
        "tables": 3 * SEEDS,
        "rows": [
            {
                "what": name,
                "median_s": statistics.median(seconds[name]),
                "worst_s": max(seconds[name]),
                "median_above_lower_bound": statistics.median(above[name]),
                "share_within_1_percent": statistics.mean(distance <= 0.01 for distance in above[name]),
            }
            for name in seconds
        ],
    }
    save_result("allocation", "python benchmarks/allocation.py", result)


if __name__ == "__main__":
    main()
