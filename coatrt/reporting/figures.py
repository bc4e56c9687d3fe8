"""The figures of a report, drawn with matplotlib: every one goes into the page as SVG and can be written as PNG."""

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from coatrt.planning.pareto import pareto_indices
from coatrt.reporting.collect import Entry, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FIGURES", "bits_figure", "colour", "draw", "latency_figure", "memory_figure", "pareto_figure"]

COLOURS = ("#3b6fb6", "#d1495b", "#2a9d8f", "#e09f3e", "#7b5ea7", "#4f6d7a", "#b5651d", "#5c8a3a", "#a23e8c", "#1b98a6")
BAR_COLOURS = {
    "weights": "#3b6fb6",
    "scales": "#7fa8d9",
    "other tensors": "#b8c4d6",
    "engine": "#e09f3e",
    "LoRA": "#d1495b",
    "KV cache": "#2a9d8f",
    "activations": "#7b5ea7",
    "runtime": "#cbd2d9",
    "predicted": "#b8c4d6",
    "bound: bytes over peak bandwidth": "#3b6fb6",
}

Bar = tuple[str, float, float]
"""A name of `BAR_COLOURS`, where the bar starts, its width."""


def colour(entries: Sequence[Entry], entry: Entry) -> str:
    """Return the colour of an entry, the same in every figure."""
    return COLOURS[entries.index(entry) % len(COLOURS)]


def draw(name: str, report: Report, kind: str) -> bytes:
    """Return a figure of `FIGURES` as "svg" or "png"."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its cache without a home is no one's concern
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(fname=Path(__file__).with_name("figures.mplstyle")):
        figure = Figure()
        FIGURES[name](figure, report)
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return stream.getvalue()


def pareto_figure(figure: "Figure", report: Report) -> None:
    """Draw predicted loss over bytes: each front as a line, the chosen configuration of every device as a point."""
    from matplotlib.patheffects import withStroke

    axis = figure.subplots()
    fronts: dict[tuple[tuple[float, float], ...], str] = {}
    groups: dict[tuple[float, float], list[Entry]] = {}
    for entry in report.entries:
        fronts.setdefault(_own_bytes(entry), colour(report.entries, entry))
        loss = entry.plan.get("predicted_loss_increase")
        if loss is not None:
            size = entry.plan.get("engine_bytes", entry.config.nbytes(entry.model)) / 1e6
            groups.setdefault((round(size, 1), round(loss, 4)), []).append(entry)
    for points, shade in fronts.items():
        if points:
            axis.plot(*zip(*points, strict=True), color=shade, lw=1.4, alpha=0.55)
    for number, (point, members) in enumerate(sorted(groups.items())):
        shade = colour(report.entries, members[0])
        axis.scatter(*point, s=74, color=shade, edgecolor="white", lw=1.2, zorder=5)
        axis.annotate(
            ", ".join(entry.title for entry in members),
            point,
            xytext=(10, 12 if number % 2 == 0 else -18),
            textcoords="offset points",
            fontsize=8.5,
            color=shade,
            weight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=6,
        )
    axis.set(xlabel="engine, MB (predicted)", ylabel="predicted loss increase, nats per token (before the adapter)")
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_ylim(bottom=0)


def _own_bytes(entry: Entry) -> tuple[tuple[float, float], ...]:
    """Return the front as (MB of the engine, loss), what lies beside the engine taken off."""
    front, memory = entry.plan.get("front", ()), entry.plan.get("memory_bytes", {})
    fixed = sum(memory.values()) - entry.plan.get("engine_bytes", 0)
    points = [(round((size - fixed) / 1e6, 2), round(loss, 5)) for size, _, loss in front]
    return tuple(points[i] for i in pareto_indices(points))


def bits_figure(figure: "Figure", report: Report) -> None:
    """Draw bits per weight of every matrix: a panel per distinct configuration, module kinds down, layers across."""
    panels: dict[str, list[Entry]] = {}
    for entry in report.entries:
        panels.setdefault(entry.config.hash, []).append(entry)
    first = report.entries[0].model
    kinds = list(dict.fromkeys(matrix.kind for matrix in first.targets))
    layers = 1 + max(matrix.layer for matrix in first.targets)
    figure.set_figheight(0.6 + 1.75 * len(panels))
    axes = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for axis, members in zip(axes, panels.values(), strict=True):
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
        axis.spines[:].set_visible(False)
        names = ", ".join(member.title for member in members)
        tables = ", ".join(f"{m.kind} {entry.config[m.name]}" for m in entry.model.matrices if m.is_table)
        axis.set_title(f"{names}   {entry.bits:.2f} bits   ({tables})")
    axes[-1].set_xlabel("decoder layer")
    bar = figure.colorbar(image, ax=axes.tolist(), label="bits per weight, scales included", pad=0.015)
    bar.outline.set_visible(False)


def memory_figure(figure: "Figure", report: Report) -> None:
    """Draw what each device holds, stacked by purpose."""
    rows = []
    for entry in report.entries:
        bars, end = [], 0.0
        for name, size in entry.plan.get("memory_bytes", {}).items():
            bars.append((name, end, size / 2**20))
            end += size / 2**20
        limit = entry.plan.get("limit_bytes")
        room = f"of {limit / 2**30:.3g} GiB" if limit else ""
        if bars:
            rows.append((entry.title, bars, f"{end:,.0f} MiB {room}"))
    _draw_bars(figure, rows, "MiB")


def latency_figure(figure: "Figure", report: Report) -> None:
    """Draw predicted milliseconds per token over what peak bandwidth alone would allow."""
    rows = []
    for entry in report.entries:
        seconds, bound = entry.plan.get("decode_seconds"), entry.plan.get("tokens_per_second_bound")
        if seconds:
            bars = [("predicted", 0.0, 1e3 * seconds)]
            if bound:
                bars.append(("bound: bytes over peak bandwidth", 0.0, 1e3 / bound))
            rows.append((entry.title, bars, f"{1e3 * seconds:.2f} ms, {1 / seconds:,.0f} tokens/s"))
    _draw_bars(figure, rows, "ms per token, one sequence, full cache")


def _draw_bars(figure: "Figure", rows: Sequence[tuple[str, Sequence[Bar], str]], unit: str) -> None:
    """Draw a row per entry: its title, its bars and a note behind them."""
    figure.set_figheight(1.3 + 0.42 * max(len(rows), 1))
    axis, legend = figure.subplots(), {}
    for row, (_, bars, note) in enumerate(rows):
        for name, start, width in bars:
            legend[name] = axis.barh(row, width, left=start, height=0.62, color=BAR_COLOURS[name])
        end = max(start + width for _, start, width in bars)
        axis.text(end, row, f"  {note}", va="center", fontsize=8.5, color="#616e7c")
    axis.set_yticks(range(len(rows)), [title for title, _, _ in rows], color="#1f2933")
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(unit)
    axis.legend(legend.values(), legend.keys(), ncols=4, loc="lower center", bbox_to_anchor=(0.45, 1.0))


FIGURES = {"pareto": pareto_figure, "bits": bits_figure, "memory": memory_figure, "latency": latency_figure}
"""Figure by name, in the order of the page."""
