"""The figures of a report, drawn with matplotlib: every one goes into the page as SVG and can be written as PNG.

What is measured or exact is filled, what is predicted or assumed is hatched. A figure is as wide as a phone's screen:
names stand above their bars, so that no label is cut.
"""

import importlib.util
import io
import logging
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coatrt.errors import ConfigError
from coatrt.evaluation.presentation import wilson_interval
from coatrt.planning.pareto import pareto_indices
from coatrt.reporting.collect import Entry, Report
from coatrt.reporting.measured import Quality, Score
from coatrt.reporting.summary import digits, gibibytes, label, listed, merged, relative, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FIGURES", "draw", "figure_names"]

INK, FAINT, LINE = "#1f2933", "#616e7c", "#e4e7eb"
WITHOUT, WITH = "#8a94a6", "#3b6fb6"
_ASSUMED = ("engine", "activations", "runtime")
_MOST_CHANGE = 1e4  # of perplexity, drawn; a loss beyond is of a model that says nothing
_MEMORY = {
    "weights": ("weights", "#3b6fb6"),
    "scales": ("scales", "#7fa8d9"),
    "other tensors": ("other tensors", "#9fb0c8"),
    "engine": ("engine overhead", "#e09f3e"),
    "LoRA": ("LoRA", "#d1495b"),
    "KV cache": ("attention cache", "#2a9d8f"),
    "activations": ("working memory", "#7b5ea7"),
    "runtime": ("runtime", "#8a94a6"),
}


def draw(name: str, report: Report, kind: str) -> bytes:
    """Return a figure of `FIGURES` as "svg" or "png".

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the figures of a report need matplotlib; install coatrt with its extra report")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its cache without a home is no one's concern
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(fname=Path(__file__).with_name("figures.mplstyle")):
        figure = Figure()
        FIGURES[name](figure, report)
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return stream.getvalue()


def figure_names(report: Report) -> list[str]:
    """Return the figures that a report has numbers for, in the order of the page."""
    has = {
        "quality": bool(_points(report)),
        "memory": any(entry.plan for entry in report.entries),
        "speed": any(_speeds(entry) for entry in report.entries),
        "tradeoff": any(entry.plan.get("front") for entry in report.entries),
    }
    return [name for name in FIGURES if has.get(name, True)]


def quality_figure(figure: "Figure", report: Report) -> None:
    """Draw measured quality over bits per weight: without the LoRA and with it, the original as a line."""
    axis, points = figure.subplots(), _points(report)
    accuracy = all(quality.task == "choice" for _, quality in points)
    bits = [bits for bits, _ in points]
    for what, key, colour, side in (
        ("without the LoRA", "quantized", WITHOUT, 1),
        ("with its LoRA", "adapted", WITH, -1),
    ):
        scores: list[tuple[Quality, Score]] = [(quality, getattr(quality, key)) for _, quality in points]
        values = [
            100 * (score["accuracy"] if accuracy else min(relative(quality, score), _MOST_CHANGE))
            for quality, score in scores
        ]
        if accuracy:
            ranges = [wilson_interval(score["accuracy"], quality.examples) for quality, score in scores]
            low, high = ([abs(100 * r[i] - v) for r, v in zip(ranges, values, strict=True)] for i in (0, 1))
            places = [place - 0.008 * side * (max(bits) - min(bits)) for place in bits]  # intervals side by side
            axis.errorbar(places, values, [low, high], fmt="o", ms=5, color=colour, capsize=3, label=what)
        else:
            axis.plot(bits, values, "o-", ms=5, lw=1.6, color=colour, label=what)
    if accuracy:
        bases = [100 * quality.base["accuracy"] for _, quality in points]
        axis.axhline(float(np.mean(bases)), color=INK, lw=1.2, ls=(0, (4, 2)), label="16-bit original")
        axis.set_ylabel("right answers, % (with 95 % interval)")
    else:
        axis.axhline(0, color=INK, lw=1.2, ls=(0, (4, 2)), label="16-bit original")
        axis.set_ylabel("perplexity against the original, %")
        if axis.get_ylim()[1] > 300:  # a version that is of no use must not hide the others
            axis.set_yscale("symlog", linthresh=100)
    axis.set_xlabel("bits per weight")
    axis.margins(x=0.08)
    axis.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.44, 1.0))


def _points(report: Report) -> list[tuple[float, Quality]]:
    """Return (bits, quality) by bits, of bundles and the budgets of trainings, as far as measured on one sample.

    Numbers of different passages or lengths are not comparable. The sample is the one of the most bundles, then of the
    most points.
    """
    found = {}
    for training in report.trained:
        for bits, hash, quality in training.budgets:
            found[hash, training.hash] = (False, bits, quality)
    for entry in report.entries:
        if entry.quality is not None:
            found[entry.config.hash, entry.plan.get("adapter", "")] = True, entry.bits, entry.quality
    by_sample: dict[tuple[object, ...], list[tuple[bool, float, Quality]]] = {}
    for point in found.values():
        by_sample.setdefault(point[2].sample, []).append(point)
    most = max(by_sample.values(), key=lambda points: (sum(point[0] for point in points), len(points)), default=[])
    return sorted(((bits, quality) for _, bits, quality in most), key=lambda point: point[0])


def bits_figure(figure: "Figure", report: Report) -> None:
    """Draw the format of every matrix: a panel per distinct configuration, module kinds down, layers across."""
    from matplotlib.patches import Patch, PathPatch
    from matplotlib.path import Path as Outline
    from matplotlib.ticker import MaxNLocator

    groups = merged(report.entries, lambda entry: entry.config.hash)
    first = report.entries[0].model
    kinds = list(dict.fromkeys(matrix.kind for matrix in first.targets))
    layers = 1 + max(matrix.layer for matrix in first.targets)
    colours = _format_colours(report)
    figure.set_figheight(0.85 + (0.42 + 0.132 * len(kinds)) * len(groups))
    axes: list[Axes] = figure.subplots(len(groups), squeeze=False, sharex=True)[:, 0].tolist()
    for axis, members in zip(axes, groups, strict=True):
        entry = members[0]
        cells: dict[str, list[list[tuple[float, float]]]] = {}
        for matrix in entry.model.targets:
            cells.setdefault(str(entry.config[matrix.name].effective(matrix.K)), []).append(
                _square(matrix.layer, kinds.index(matrix.kind))
            )
        for text, squares in cells.items():  # one path for each format: a page of many layers stays small
            outline = Outline.make_compound_path(*(Outline(square, closed=True) for square in squares))
            axis.add_patch(PathPatch(outline, facecolor=colours[text], edgecolor="none"))
        axis.set(xlim=(-0.5, layers - 0.5), ylim=(len(kinds) - 0.5, -0.5))
        axis.grid(False)
        axis.set_yticks(range(len(kinds)), [kind.replace("_proj", "") for kind in kinds], fontsize=7.5)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(f"{_names(members, 36)}: {entry.bits:.2f} bits", pad=3)
    axes[-1].set_xlabel("layer of the model")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    patches = [Patch(color=colour) for colour in colours.values()]
    figure.legend(patches, list(colours), ncols=3 if max(map(len, colours)) < 12 else 2, loc="outside upper left")


def _square(layer: int, row: int, half: float = 0.44) -> list[tuple[float, float]]:
    left, right, top, bottom = layer - half, layer + half, row - half, row + half
    return [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]


def _format_colours(report: Report) -> dict[str, Any]:
    """Return format → colour, fewest bits first: few bits are dark, many are light."""
    from matplotlib import colormaps

    found: dict[str, float] = {}
    for entry in report.entries:
        for matrix in entry.model.targets:
            fmt = entry.config[matrix.name].effective(matrix.K)
            found[str(fmt)] = min(fmt.bits_per_weight(matrix.K), found.get(str(fmt), math.inf))
    ordered = sorted(found, key=lambda text: (found[text], text))
    places = np.linspace(0.12, 0.92, len(ordered)) if len(ordered) > 1 else [0.5]
    return {text: colormaps["viridis"](float(place)) for text, place in zip(ordered, places, strict=True)}


def memory_figure(figure: "Figure", report: Report) -> None:
    """Draw what each device holds, stacked by purpose; a row for all that hold the same."""
    rows = []
    planned = [entry for entry in report.entries if entry.plan]
    total = max(sum(entry.plan["memory_bytes"].values()) for entry in planned)
    unit, name = (2**30, "GiB") if total >= 2**31 else (2**20, "MiB")
    for group in merged(planned, lambda entry: tuple(_whole_mib(entry).items())):
        bars, end = [], 0.0
        for purpose, count in group[0].plan["memory_bytes"].items():
            title, colour = _MEMORY[purpose]
            bars.append((title, end, count / unit, colour, purpose in _ASSUMED))
            end += count / unit
        limits = [entry.plan["limit_bytes"] for entry in group if entry.plan["limit_bytes"]]
        note = f"≈ {end:,.{0 if end >= 10 else 1}f} {name}" + (f" of {span(limits, gibibytes)}" if limits else "")
        rows.append((_names(group, 56), bars, note))
    _draw_bars(figure, rows, name)


def _whole_mib(entry: Entry) -> dict[str, int]:
    return {purpose: round(count / 2**20) for purpose, count in entry.plan["memory_bytes"].items()}


def speed_figure(figure: "Figure", report: Report) -> None:
    """Draw tokens per second, measured or predicted; a row for all that are as fast."""
    rows = []
    for group in merged(report.entries, _speeds):
        if (speed := _speeds(group[0])) is not None:
            what, value, text = speed
            rows.append((_names(group, 56), [(what, 0.0, value, WITH, what != "measured")], f"{text} tokens/s"))
    _draw_bars(figure, rows, "tokens per second, with the LoRA")


def _speeds(entry: Entry) -> tuple[str, float, str] | None:
    """Return what the speed of an entry is (measured or predicted), as it is shown, as a number and as text."""
    measured, seconds = entry.decode_tokens_per_second, entry.plan.get("decode_seconds")
    if measured is not None:
        return "measured", float(f"{measured:.3g}"), digits(measured, 3)
    return ("predicted", float(f"{1 / seconds:.2g}"), f"≈ {digits(1 / seconds, 2)}") if seconds else None


Bar = tuple[str, float, float, str, bool]
"""What it is, where it starts, its width, its colour, whether it is assumed."""


def _draw_bars(figure: "Figure", rows: Sequence[tuple[str, Sequence[Bar], str]], unit: str) -> None:
    """Draw a row per device: its name and a note above, its bars below them."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    names = [_wrapped(name) for name, _, _ in rows]
    places, place = [], 0.0
    for name in names:  # a name of two lines takes more room
        place += 0.42 + 0.3 * len(name.splitlines())
        places.append(place)
    entries = len({what for _, bars, _ in rows for what, *_ in bars})
    figure.set_figheight(0.7 + 0.5 * place + 0.2 * math.ceil(entries / 3))
    axis = figure.subplots()
    legend: dict[str, Any] = {}
    most = max(start + width for _, bars, _ in rows for _, start, width, _, _ in bars)
    for at, name, (_, bars, note) in zip(places, names, rows, strict=True):
        for what, start, width, colour, assumed in bars:
            legend[what] = axis.barh(at, width, left=start, height=0.3, **_style(colour, assumed))
        axis.text(0, at - 0.2, name, va="bottom", weight="bold", fontsize=8, linespacing=1.1)
        axis.text(most, at - 0.2, note, va="bottom", ha="right", fontsize=8, color=FAINT)
    axis.set(ylim=(place + 0.3, 0), xlim=(0, most * 1.005), yticks=[])
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}" if most >= 10 else "{x:.1f}"))
    axis.grid(axis="y", visible=False)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel(unit)
    figure.legend(list(legend.values()), list(legend), ncols=3, loc="outside lower left")


def _wrapped(name: str) -> str:
    """Return a name in lines that leave room for the note beside them, two at most."""
    lines = textwrap.wrap(name, 30)
    return "\n".join(lines[:2]) + (" …" if len(lines) > 2 else "")


def _names(entries: Sequence[Entry], most: int) -> str:
    """Return the devices of entries in at most so many characters: "RTX 3060 and 4 others" where all are too long."""
    names = list(dict.fromkeys(map(label, entries)))
    whole = listed(names)
    if len(whole) > most and len(names) > 1:
        whole = f"{names[0]} and {len(names) - 1} other{'s' if len(names) > 2 else ''}"
    return whole if len(whole) <= most else f"{whole[: most - 1]}…"


def _style(colour: str, assumed: bool) -> Mapping[str, Any]:
    """Return how a bar is filled: solid where measured or exact, hatched where predicted or assumed."""
    if assumed:
        return {"facecolor": "none", "edgecolor": colour, "hatch": "/////", "linewidth": 0.8}
    return {"facecolor": colour, "edgecolor": colour, "linewidth": 0.8}


def tradeoff_figure(figure: "Figure", report: Report) -> None:
    """Draw the estimated loss of quality over the predicted size: what each device could have, and what was chosen."""
    axis = figure.subplots()
    planned = [entry for entry in report.entries if entry.plan.get("front")]
    for front in dict.fromkeys(map(_front, planned)):
        if front:
            axis.plot(*zip(*front, strict=True), color=WITHOUT, lw=1.2, ls=(0, (3, 2)))
    axis.margins(x=0.12, y=0.2)
    middle = sum(axis.get_xlim()) / 2
    for number, group in enumerate(merged(planned, _chosen)):
        right = _chosen(group[0])[0] > middle
        axis.scatter(*_chosen(group[0]), s=52, color="white", edgecolor=WITH, hatch="//////", lw=1.2, zorder=5)
        axis.annotate(
            _names(group, 28),
            _chosen(group[0]),
            xytext=(-7 if right else 7, 7 if number % 2 == 0 else 18),
            ha="right" if right else "left",
            textcoords="offset points",
            fontsize=8,
            weight="bold",
            zorder=6,
        )
    axis.set(xlabel="size of the engine, MB (predicted)", ylabel="estimated rise of perplexity\nwithout the LoRA, %")
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(bottom=0)


def _rise(loss: float) -> float:
    """Return the rise of perplexity in percent that an increase of the loss is."""
    return 100 * math.expm1(min(loss, 20))


def _chosen(entry: Entry) -> tuple[float, float]:
    return round(entry.plan["engine_bytes"] / 1e6, 1), round(_rise(entry.plan["predicted_loss_increase"]), 2)


def _front(entry: Entry) -> tuple[tuple[float, float], ...]:
    """Return the front as (MB of the engine, percent), what lies beside the engine taken off."""
    front, memory = entry.plan["front"], entry.plan["memory_bytes"]
    fixed = sum(memory.values()) - entry.plan["engine_bytes"]
    points = [(round((count - fixed) / 1e6, 2), round(_rise(loss), 4)) for count, _, loss in front]
    return tuple(points[i] for i in pareto_indices(points))


FIGURES = {
    "quality": quality_figure,
    "memory": memory_figure,
    "speed": speed_figure,
    "bits": bits_figure,
    "tradeoff": tradeoff_figure,
}
"""Figure by name, in the order of the page."""
