"""The figures of a report, drawn with matplotlib: every one goes into the page as SVG and can be written as PNG."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from coatrt.reporting.collect import Entry, Report

__all__ = ["FIGURES", "bits_figure", "draw", "latency_figure", "memory_figure", "pareto_figure"]

COLOURS = ("#3b6fb6", "#d1495b", "#2a9d8f", "#e09f3e", "#7b5ea7", "#4f6d7a", "#b5651d", "#5c8a3a", "#a23e8c", "#1b98a6")
_INK, _FAINT, _GRID = "#1f2933", "#616e7c", "#e4e7eb"
MEMORY_COLOURS = {
    "weights": "#3b6fb6",
    "scales": "#7fa8d9",
    "other tensors": "#b8c4d6",
    "engine": "#e09f3e",
    "LoRA": "#d1495b",
    "KV cache": "#2a9d8f",
    "activations": "#7b5ea7",
    "runtime": "#cbd2d9",
}


def _style() -> dict[str, Any]:
    return {
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _FAINT,
        "axes.titlecolor": _INK,
        "text.color": _INK,
        "xtick.color": _FAINT,
        "ytick.color": _FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": _GRID,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "svg.fonttype": "path",
        "figure.facecolor": "white",
        "svg.hashsalt": "coatrt",
    }


def colour(entries: Sequence[Entry], entry: Entry) -> str:
    """Return the colour of an entry, the same in every figure."""
    return COLOURS[entries.index(entry) % len(COLOURS)]


def draw(name: str, report: Report, kind: str) -> bytes:
    """Return a figure of `FIGURES` as "svg" or "png"."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with matplotlib.rc_context(_style()):
        figure = FIGURES[name](plt, report)
        stream = io.BytesIO()
        extra = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 160}
        figure.savefig(stream, format=kind, bbox_inches="tight", pad_inches=0.08, **extra)
        plt.close(figure)
    return stream.getvalue()


def _loss(entry: Entry) -> float | None:
    return entry.plan.get("predicted_loss_increase")


def pareto_figure(plt: Any, report: Report) -> Any:
    """Return predicted loss over bytes: each front as a line, the chosen configuration of every device as a point."""
    from matplotlib.patheffects import withStroke

    figure, axis = plt.subplots(figsize=(9.2, 4.6), layout="constrained")
    drawn: set[tuple[tuple[float, float], ...]] = set()
    for entry in report.entries:
        points = _own_bytes(entry)
        if points and points not in drawn:
            drawn.add(points)
            axis.plot(*zip(*points, strict=True), color=colour(report.entries, entry), lw=1.4, alpha=0.55)
    groups: dict[tuple[float, float], list[Entry]] = {}
    for entry in report.entries:
        loss = _loss(entry)
        if loss is not None:
            size = entry.plan.get("engine_bytes", entry.config.nbytes(entry.model)) / 1e6
            groups.setdefault((round(size, 1), round(loss, 4)), []).append(entry)
    for number, ((size, loss), members) in enumerate(sorted(groups.items())):
        axis.scatter(
            [size], [loss], s=74, color=colour(report.entries, members[0]), edgecolor="white", lw=1.2, zorder=5
        )
        names = ", ".join(entry.title for entry in members)
        axis.annotate(
            names,
            (size, loss),
            xytext=(10, 12 if number % 2 == 0 else -18),
            textcoords="offset points",
            fontsize=8.5,
            color=colour(report.entries, members[0]),
            weight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=6,
        )
    axis.set_xlabel("engine, MB (predicted)")
    axis.set_ylabel("predicted loss increase, nats per token (before the adapter)")
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_ylim(bottom=0)
    return figure


def _own_bytes(entry: Entry) -> tuple[tuple[float, float], ...]:
    """Return the front as (MB of the engine, loss), what lies beside the engine taken off."""
    front, memory = entry.plan.get("front", ()), entry.plan.get("memory_bytes", {})
    fixed = sum(memory.values()) - entry.plan.get("engine_bytes", 0)
    points = sorted((round((size - fixed) / 1e6, 2), round(loss, 5)) for size, _, loss in front)
    best, kept = float("inf"), []
    for size, loss in points:
        if loss < best:
            best = loss
            kept.append((size, loss))
    return tuple(kept)


def bits_figure(plt: Any, report: Report) -> Any:
    """Return bits per weight of every matrix: a panel per distinct configuration, module kinds down, layers across."""
    panels: dict[str, list[Entry]] = {}
    for entry in report.entries:
        panels.setdefault(entry.config.hash, []).append(entry)
    first = report.entries[0].model
    kinds = list(dict.fromkeys(matrix.kind for matrix in first.targets))
    layers = 1 + max(matrix.layer for matrix in first.targets)
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9.2, 0.6 + 1.75 * len(panels)), squeeze=False, layout="constrained", sharex=True
    )
    image = None
    for axis, members in zip(axes[:, 0], panels.values(), strict=True):
        entry = members[0]
        bits = np.full((len(kinds), layers), np.nan)
        for matrix in entry.model.targets:
            fmt = entry.config[matrix.name].effective(matrix.K)
            bits[kinds.index(matrix.kind), matrix.layer] = fmt.bits_per_weight(matrix.K)
        image = axis.imshow(bits, aspect="auto", vmin=2, vmax=8.5, cmap="viridis")
        axis.grid(False)
        axis.set_yticks(range(len(kinds)), [kind.replace("_proj", "") for kind in kinds], fontsize=8)
        axis.set_yticks(np.arange(-0.5, len(kinds)), minor=True)
        axis.set_xticks(np.arange(-0.5, layers), minor=True)
        axis.grid(which="minor", color="white", lw=0.9)
        axis.tick_params(which="both", length=0)
        tables = ", ".join(
            f"{matrix.kind} {entry.config[matrix.name]}" for matrix in entry.model.matrices if matrix.is_table
        )
        names = ", ".join(member.title for member in members)
        title = f"{names}   {entry.config.average_bits(entry.model):.2f} bits   ({tables})"
        axis.set_title(title, loc="left", fontsize=9, weight="bold")
        for spine in axis.spines.values():
            spine.set_visible(False)
    axes[-1, 0].set_xlabel("decoder layer")
    bar = figure.colorbar(image, ax=axes[:, 0].tolist(), label="bits per weight, scales included", pad=0.015)
    bar.outline.set_visible(False)
    return figure


def memory_figure(plt: Any, report: Report) -> Any:
    """Return what each device holds, stacked by purpose."""
    shown = [entry for entry in report.entries if entry.plan.get("memory_bytes")]
    figure, axis = plt.subplots(figsize=(9.2, 1.3 + 0.42 * max(len(shown), 1)), layout="constrained")
    for row, entry in enumerate(shown):
        start = 0.0
        for name, size in entry.plan["memory_bytes"].items():
            width = size / 2**20
            axis.barh(
                row,
                width,
                left=start,
                height=0.62,
                color=MEMORY_COLOURS.get(name, "#9aa5b1"),
                label=name if row == 0 else None,
            )
            start += width
        limit = entry.plan.get("limit_bytes")
        room = f"of {limit / 2**30:.3g} GiB" if limit else ""
        axis.text(start, row, f"  {start:,.0f} MiB {room}", va="center", fontsize=8.5, color=_FAINT)
    axis.set_yticks(range(len(shown)), [entry.title for entry in shown], color=_INK)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("MiB")
    axis.legend(ncols=4, frameon=False, fontsize=8.5, loc="lower center", bbox_to_anchor=(0.45, 1.0))
    return figure


def latency_figure(plt: Any, report: Report) -> Any:
    """Return predicted milliseconds per token over what peak bandwidth alone would allow."""
    shown = [entry for entry in report.entries if entry.plan.get("decode_seconds")]
    figure, axis = plt.subplots(figsize=(9.2, 1.2 + 0.42 * max(len(shown), 1)), layout="constrained")
    for row, entry in enumerate(shown):
        predicted = 1e3 * entry.plan["decode_seconds"]
        bound = entry.plan.get("tokens_per_second_bound")
        axis.barh(row, predicted, height=0.62, color="#b8c4d6", label="predicted" if row == 0 else None)
        if bound:
            axis.barh(
                row,
                1e3 / bound,
                height=0.62,
                color="#3b6fb6",
                label="bound: bytes over peak bandwidth" if row == 0 else None,
            )
        axis.text(
            predicted,
            row,
            f"  {predicted:.2f} ms, {1e3 / predicted:,.0f} tokens/s",
            va="center",
            fontsize=8.5,
            color=_FAINT,
        )
    axis.set_yticks(range(len(shown)), [entry.title for entry in shown], color=_INK)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("ms per token, one sequence, full cache")
    if shown:
        axis.legend(ncols=2, frameon=False, fontsize=8.5, loc="lower center", bbox_to_anchor=(0.45, 1.0))
    return figure


FIGURES = {"pareto": pareto_figure, "bits": bits_figure, "memory": memory_figure, "latency": latency_figure}
"""Figure by name, in the order of the page."""
