"""Time of an allocation: SmolLM2's shapes, 210 matrices each free to take one of 12 formats, many budgets.

python benchmarks/allocation.py

Costs are exponential draws over 4^bits, fresh for every seed; costs that follow the size of the matrix and costs with
no order among the formats are asked too. Needs no model.
"""

import statistics
import time
from typing import Any

import numpy as np
from common import save_result

from coatrt.configs.space import ConfigSpace
from coatrt.models.matrices import ModelMatrices, matrices_of
from coatrt.planning.knapsack import allocate, cost_matrix, lagrangian_choice
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
    found = {"model.embed_tokens.weight": (64, 64)}
    for layer in range(30):
        at = f"model.layers.{layer}"
        found |= {
            f"{at}.self_attn.{kind}_proj.weight": (rows, 576)
            for kind, rows in (("q", 576), ("k", 192), ("v", 192), ("o", 576))
        }
        found |= {f"{at}.mlp.gate_proj.weight": (1536, 576), f"{at}.mlp.up_proj.weight": (1536, 576)}
        found |= {f"{at}.mlp.down_proj.weight": (576, 1536)}
    whole = matrices_of(found, tied=True)
    return ModelMatrices(whole.targets, tied=True)


def tables(space: ConfigSpace, kind: str, seed: int) -> dict[str, dict[str, float]]:
    """Return costs of one kind: "ordered" (fewer bits cost more), "sized" (by size too), "unordered"."""
    rng = np.random.default_rng(seed)
    made = {}
    for matrix in space.model.matrices:
        scale = rng.exponential() * (matrix.N * matrix.K / 1e6 if kind == "sized" else 1.0)
        made[matrix.name] = {
            str(fmt): float(
                scale * rng.exponential() / (1.0 if kind == "unordered" else 4 ** fmt.bits_per_weight(matrix.K))
            )
            for fmt in space.formats
        }
    return made


def main() -> None:
    """Time every budget and write the result."""
    space = ConfigSpace(shapes(), tuple(map(WeightFormat.parse, FORMATS)), fused=False)
    allocate(space, tables(space, "ordered", 9), max_bytes=space.sizes.mean(1).sum())  # scipy is imported here
    rows: list[dict[str, Any]] = []
    for kind in ("ordered", "sized", "unordered"):
        for seed in range(SEEDS):
            costs = tables(space, kind, seed)
            price, size = cost_matrix(space, costs), space.sizes.astype(float)
            least, most = float(size.min(1).sum()), float(size.max(1).sum())
            for share in np.linspace(0.0, 1.0, BUDGETS):
                budget = least + share * (most - least)
                started = time.perf_counter()
                config = allocate(space, costs, max_bytes=budget)
                seconds = time.perf_counter() - started
                choice = [space.formats.index(config[group[0]]) for group in space.groups]
                value = float(price[np.arange(len(choice)), choice].sum())
                floor = lagrangian_choice(price, size, np.floor(budget) + 0.5)[2]
                started = time.perf_counter()
                allocate(space, costs, max_cost=value)
                rows.append(
                    {
                        "costs": kind,
                        "seed": seed,
                        "bits": 8 * budget / space.model.parameters,
                        "bytes_bound_s": seconds,
                        "cost_bound_s": time.perf_counter() - started,
                        "above_lower_bound": (value - floor) / value,
                    }
                )
    every = [row[key] for row in rows for key in ("bytes_bound_s", "cost_bound_s")]
    result = {
        "groups": len(space.groups),
        "formats": len(FORMATS),
        "allocations": len(every),
        "worst_s": max(every),
        "median_s": statistics.median(every),
        "median_above_lower_bound": statistics.median(row["above_lower_bound"] for row in rows),
        "worst_above_lower_bound": max(row["above_lower_bound"] for row in rows),
        "worst_rows": sorted(rows, key=lambda row: -max(row["bytes_bound_s"], row["cost_bound_s"]))[:5],
    }
    save_result("allocation", "python benchmarks/allocation.py", result)


if __name__ == "__main__":
    main()
