"""The evidence's tables and plot, from the JSON that benchmarks/method/run.py left.

python benchmarks/method/report.py   draws docs/evidence/method.png; benchmarks/tables.py fills docs/evidence
"""

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from markdown_tables import grid

from coatrt.planning.pareto import hypervolume

__all__ = [
    "FEEDBACK",
    "REFINED",
    "accuracy_table",
    "arms_of",
    "codes_table",
    "costs_table",
    "gaps",
    "main_table",
    "rivals_table",
    "unseen_table",
]

RESULTS = Path(__file__).parents[1] / "results" / "method"
_REFERENCE_BITS, _REFERENCE_NATS = 10.0, 1.0
_RIVALS = (
    "none",
    "single",
    "single-same-tokens",
    "single-shared-compute",
    "shared",
    "shared-rates",
    "shared-rank",
    "bank",
    "paper",
    "coatrt",
)
_AGAINST = {
    "coatrt-random": ("coatrt", "shared-rates"),
    "residual": ("coatrt", "coatrt-random"),
    "coatrt-sides": ("coatrt",),
    "coatrt-sides-noise": ("coatrt-sides",),
    "coatrt-sides-slope": ("coatrt-sides",),
    "coatrt-gentle": ("coatrt",),
    "coatrt-faster": ("coatrt",),
    "coatrt-slower": ("coatrt",),
    "shared-faster": ("shared",),
    "shared-slower": ("shared",),
}
"""What the variants are held against."""


FEEDBACK, REFINED, LEARNED = "smollm2-feedback", "smollm2-refined", "smollm2-learned"
_CODES = {FEEDBACK: "`feedback`", REFINED: "`refined`", LEARNED: "`refined`, scales learned"}
"""Names of the codes in results, and in tables."""


def _results() -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]


def arms_of(task: str, model: str) -> dict[str, list[dict[str, Any]]]:
    """Return arm → results by seed, the rivals first, under the codes of `model`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in _results():
        if (result["task"], result["model"]) == (task, model):
            found.setdefault(result["arm"], []).append(result)
    order = {name: i for i, name in enumerate(_RIVALS)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def _means(
    results: Iterable[dict[str, Any]], kind: str, seen: bool, budget: float | None = None, what: str = "loss"
) -> list[float]:
    """Return per seed the mean of a figure over some rows, seeds without such rows left out."""
    found = []
    for result in results:
        rows = [
            row[what]
            for row in result["rows"]
            if row["kind"] == kind and row["seen"] == seen and budget in (None, row["budget"])
        ]
        if rows:
            found.append(statistics.mean(rows))
    return found


def _text(values: list[float], signed: bool = False) -> str:
    """Return mean ± standard deviation over seeds."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    mean = f"{statistics.mean(values):{'+' if signed else ''}.3f}{spread}"
    return mean.replace("-", "−")


def _volume(result: dict[str, Any], base: float) -> float:
    points = [
        (row["bits_with_lora"], row["loss"]) for row in result["rows"] if row["kind"] == "planned" and row["seen"]
    ]
    return hypervolume(points, (_REFERENCE_BITS, base + _REFERENCE_NATS))


def main_table(task: str, model: str) -> str:
    """Return the losses on planned configurations that were trained on, of the rivals and ours, by budget."""
    found = arms_of(task, model)
    if "none" not in found:
        return "Not run yet."
    none = found["none"][0]
    base = none["full_precision"]["loss"]
    budgets = list(dict.fromkeys(row["budget"] for row in none["rows"]))
    rows = [
        [results[0]["what"], *(_text(_means(results, "planned", True, budget)) for budget in budgets)]
        for name, results in found.items()
        if name in _RIVALS
    ]
    accuracy = none["full_precision"].get("accuracy")
    beside = f", accuracy {accuracy:.3f}" if accuracy is not None else ""
    return (
        f"SmolLM2-135M, codes {_CODES[model]} on {task}: held-out loss in nats per predicted token, mean ± standard "
        f"deviation over seeds; full precision without adapter {base:.3f}{beside}.\n\n"
        f"{grid(['arm', *(f'{budget:g} bits' for budget in budgets)], rows)}"
    )


def codes_table(task: str) -> str:
    """Return the losses on planned configurations by arm and codes."""
    rows, budgets = [], []
    for arm in ("none", "shared", "coatrt"):
        for model, codes in _CODES.items():
            results = arms_of(task, model).get(arm, [])
            if results:
                budgets = list(dict.fromkeys(row["budget"] for row in results[0]["rows"]))
                losses = [_text(_means(results, "planned", True, budget)) for budget in budgets]
                rows.append([f"{results[0]['what']}, {codes}", *losses])
    return grid(["arm, codes", *(f"{budget:g} bits" for budget in budgets)], rows)


def costs_table(task: str, model: str) -> str:
    """Return what every arm took, and its hypervolume."""
    found = arms_of(task, model)
    if "none" not in found:
        return "Not run yet."
    base = found["none"][0]["full_precision"]["loss"]
    rows = [
        [
            results[0]["what"],
            str(len(results)),
            _text([_volume(result, base) for result in results]),
            f"{results[0]['trained_parameters'] / 1e6:.2f}",
            str(results[0]["passes"]),
            f"{statistics.mean(result['training_s'] for result in results) / 60:.0f}",
        ]
        for name, results in found.items()
        if name in _RIVALS
    ]
    head = ["arm", "seeds", "hypervolume", "M parameters", "passes", "minutes"]
    return (
        f"Hypervolume of (bits with the LoRA counted, loss) against ({_REFERENCE_BITS:g} bits, "
        f"{base + _REFERENCE_NATS:.3f}); minutes of training.\n\n{grid(head, rows)}"
    )


def accuracy_table(task: str, model: str) -> str:
    """Return the accuracies on planned configurations, trained on and not, by budget."""
    found = arms_of(task, model)
    if "none" not in found:
        return "Not run yet."
    none = found["none"][0]
    budgets = list(dict.fromkeys(row["budget"] for row in none["rows"]))
    rows = []
    for results in found.values():
        cells = []
        for budget in budgets:
            seen, unseen = (_means(results, "planned", seen, budget, "accuracy") for seen in (True, False))
            cells.append(_text([statistics.mean(both) for both in zip(seen, unseen, strict=True)] if unseen else seen))
        rows.append([results[0]["what"], *cells])
    head = ["arm", *(f"{budget:g} bits" for budget in budgets)]
    return f"Accuracy, full precision without adapter {none['full_precision']['accuracy']:.3f}.\n\n{grid(head, rows)}"


def unseen_table(task: str, model: str) -> str:
    """Return the losses by kind of configuration, means over budgets."""
    found = arms_of(task, model)
    rows = []
    for name, results in found.items():
        if name not in _RIVALS or name.startswith("single"):
            continue
        planned, random = ([_means(results, kind, seen) for seen in (True, False)] for kind in ("planned", "random"))
        rows.append([results[0]["what"], *map(_text, (*planned, *random))])
    return grid(["arm", "planned, seen", "planned, unseen", "random, seen", "random, unseen"], rows)


def _gaps(found: dict[str, list[dict[str, Any]]], left: str, right: str) -> tuple[int, list[str]]:
    """Return in how many seeds two arms were run, and the first less the second by budget, paired by seed."""
    pairs = [(ours, theirs) for ours in found[left] for theirs in found[right] if ours["seed"] == theirs["seed"]]
    cells = []
    for budget in dict.fromkeys(row["budget"] for row in found[left][0]["rows"]):
        losses = [[_means([result], "planned", True, budget)[0] for result in pair] for pair in pairs]
        cells.append(_text([ours - theirs for ours, theirs in losses], signed=True))
    return len(pairs), cells


def _compared(found: dict[str, list[dict[str, Any]]], what: str, pairs: list[tuple[str, str, str]]) -> str:
    """Return a table of differences by budget, and in how many seeds they were measured."""
    budgets = dict.fromkeys(row["budget"] for row in found["coatrt"][0]["rows"])
    counts, rows = [], []
    for label, left, right in pairs:
        seeds, cells = _gaps(found, left, right)
        counts.append(seeds)
        rows.append([label, *cells])
    most = max(counts)
    cells = [
        [label if seeds == most else f"{label} ({seeds} seed{'s' if seeds > 1 else ''})", *found_cells]
        for (label, *found_cells), seeds in zip(rows, counts, strict=True)
    ]
    table = grid([what, *(f"{budget:g} bits" for budget in budgets)], cells)
    spread = f"mean ± standard deviation over {most} seeds" if most > 1 else "one seed"
    return f"{table}\n\nNats per token, paired by seed; {spread}."


def rivals_table(task: str, model: str) -> str:
    """Return the loss of ours less that of every rival, by budget, paired by seed."""
    found = arms_of(task, model)
    if not {"coatrt", "shared"} <= set(found):
        return "Not run yet."
    rivals = [name for name in _RIVALS if name in found and name not in ("none", "coatrt")]
    return _compared(
        found, "loss of coatrt less that of", [(found[name][0]["what"], "coatrt", name) for name in rivals]
    )


def gaps(task: str, model: str) -> str:
    """Return the loss of every variant less that of what it varies, by budget, paired by seed."""
    found = arms_of(task, model)
    if "coatrt" not in found:
        return "Not run yet."
    pairs = [
        (f"{results[0]['what']} − {found[reference][0]['what']}", name, reference)
        for name, results in found.items()
        for reference in _AGAINST.get(name, ())
        if reference in found
    ]
    return _compared(found, "difference in loss (negative: the first is better)", pairs)


def main() -> None:
    """Draw the loss of every adapter against bits, for every task."""
    import matplotlib.pyplot as plt

    tasks = sorted({result["task"] for result in _results()})
    figure, axes = plt.subplots(1, len(tasks), figsize=(6.4 * len(tasks), 4.4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        codes = REFINED if "coatrt" in arms_of(task, REFINED) else FEEDBACK
        for name, results in arms_of(task, codes).items():
            if name not in _RIVALS or name == "none":  # far above all others
                continue
            rows = [row for row in results[0]["rows"] if row["kind"] == "planned" and row["seen"]]
            means = [statistics.mean(_means(results, "planned", True, row["budget"])) for row in rows]
            colour, width = ("black", 2.0) if name == "coatrt" else (f"C{_RIVALS.index(name)}", 1.2)
            axis.plot(
                [row["bits"] for row in rows],
                means,
                marker="o",
                markersize=3,
                color=colour,
                linewidth=width,
                label=results[0]["what"],
            )
        axis.set(
            title=f"SmolLM2-135M, {task}, {_CODES[codes].strip('`')}",
            xlabel="bits per weight",
            ylabel="held-out loss, nats",
        )
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(Path(__file__).parents[2] / "docs" / "evidence" / "method.png", dpi=130)


if __name__ == "__main__":
    main()
