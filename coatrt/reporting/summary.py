"""The top of a report: two sentences, and a table with a row for each configuration that differs."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from coatrt.reporting.collect import Entry, Report
from coatrt.reporting.measured import Quality, Score

__all__ = [
    "Cell",
    "Row",
    "base_row",
    "describe",
    "digits",
    "gibibytes",
    "label",
    "listed",
    "merged",
    "model_name",
    "percent",
    "relative",
    "rows",
    "sentences",
    "size",
    "span",
]

_UNITS = {"text": "blocks of text", "chat": "conversations", "choice": "questions"}


@dataclass(frozen=True)
class Cell:
    """A cell of the table.

    Args:
        text: what it shows.
        assumed: whether it is predicted or assumed; else it is measured, or exact.
    """

    text: str
    assumed: bool = False


@dataclass(frozen=True)
class Row:
    """A row of the table, for one configuration.

    Args:
        name: the devices that share it.
        bits: average bits per weight.
        size: of the engine, or of the weights where there is none.
        memory: that the device needs in all, and has.
        speed: tokens per second with the LoRA.
        quantized: quality without the LoRA.
        adapted: quality with the LoRA.
    """

    name: str
    bits: Cell
    size: Cell
    memory: Cell
    speed: Cell
    quantized: Cell
    adapted: Cell


def model_name(report: Report) -> str:
    """Return the model's name as the user knows it: the title, its name on the hub, or that of its directory."""
    if report.title:
        return report.title
    cached = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", f"{report.source}/")
    if cached is not None:  # Hugging Face's cache
        return cached[1].replace("--", "/")
    path = PurePath(report.source)
    return path.name.removesuffix(".gguf") if path.is_absolute() else report.source


def label(entry: Entry) -> str:
    """Return what a device is called: its product name, and the folder of its bundle where that is called otherwise."""
    name = str(entry.device["name"]).removeprefix("NVIDIA ").removeprefix("GeForce ")
    return name if entry.title in (entry.device.get("id"), name) else f"{name} ({entry.title})"


def listed(names: Iterable[str]) -> str:
    """Return names as "a", "a and b", or "a, b and c", each once."""
    *others, last = dict.fromkeys(names)
    return f"{', '.join(others)} and {last}" if others else last


def merged(entries: Iterable[Entry], key: Callable[[Entry], object]) -> list[list[Entry]]:
    """Return entries in groups of equal key, in the order of their first."""
    groups: dict[object, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return list(groups.values())


def percent(share: float) -> str:
    """Return a relative change: "+9 %", "−28 %", "±0 %"."""
    text = f"{100 * share:+,.0f} %".replace("-", "−")
    return "±0 %" if text[1:] == "0 %" else text


def size(count: float, most: int = 3) -> str:
    """Return a size in MB or GB."""
    value, unit = (count / 1e9, "GB") if count >= 1e9 else (count / 1e6, "MB")
    return f"{digits(value, most)} {unit}"


def describe(quality: Quality) -> str:
    """Return what a quality was measured on."""
    return f"{quality.examples:,} {_UNITS[quality.task]} ({quality.tokens:,} tokens)"


def rows(report: Report) -> list[Row]:
    """Return the table, a row for each configuration and quality; devices that share them share a row."""
    shared = len(_bases(report)) == 1
    groups = merged(report.entries, lambda entry: (entry.config.hash, str(entry.quality)))
    return [_row(group, shared) for group in groups]


def base_row(report: Report) -> Row:
    """Return the row of the original, 16 bits a weight."""
    model, bases = report.entries[0].model, _bases(report)
    base = Cell(bases[0]) if len(bases) == 1 else Cell("–")
    none = Cell("–")
    nbytes = 2 * model.parameters + model.other_bytes
    return Row("16-bit original", Cell("16"), Cell(size(nbytes)), none, none, base, none)


def _bases(report: Report) -> list[str]:
    """Return the qualities of the original as text; several where it was measured on different data."""
    qualities = [entry.quality for entry in report.entries if entry.quality is not None]
    return list(dict.fromkeys(quality.score_text(quality.base) for quality in qualities))


def _row(group: Sequence[Entry], shared_base: bool) -> Row:
    first, quality = group[0], group[0].quality
    quantized = adapted = Cell("not measured")
    if quality is not None:
        quantized, adapted = (
            Cell(_against(quality, score, shared_base)) for score in (quality.quantized, quality.adapted)
        )
    return Row(
        listed(map(label, group)), Cell(f"{first.bits:.2f}"), _size(group), _memory(group), _speed(group),
        quantized, adapted,
    )  # fmt: skip


def _against(quality: Quality, score: Score, shared_base: bool) -> str:
    """Return a score, and what it is against the original."""
    text, base = quality.score_text(score), "" if shared_base else f" of {quality.score_text(quality.base)}"
    if "accuracy" in score:
        return f"{text}{base and f'; original {quality.score_text(quality.base)}'}"
    return f"{text} ({percent(relative(quality, score))}{base})"


def relative(quality: Quality, score: Score) -> float:
    """Return by how much of itself the perplexity of a score is above that of the original."""
    return math.expm1(min(score["loss"] - quality.base["loss"], 700))


def _size(group: Sequence[Entry]) -> Cell:
    built = [entry.engine_bytes for entry in group if entry.engine_bytes is not None]
    if len(built) == len(group):
        return Cell(span(built, size))
    predicted = [entry.plan["engine_bytes"] for entry in group if entry.plan]
    if predicted:
        return Cell(f"≈ {span(predicted, lambda count: size(count, 2))}", True)
    return Cell(size(group[0].config.nbytes(group[0].model) + group[0].model.other_bytes))


def _memory(group: Sequence[Entry]) -> Cell:
    needs = [sum(entry.plan["memory_bytes"].values()) for entry in group if entry.plan]
    if not needs:
        return Cell("unknown")
    limits = [entry.plan["limit_bytes"] for entry in group if entry.plan.get("limit_bytes")]
    room = f" of {span(limits, gibibytes)}" if limits else ""
    return Cell(f"≈ {span(needs, gibibytes)}{room}", True)


def _speed(group: Sequence[Entry]) -> Cell:
    measured = [entry.decode_tokens_per_second for entry in group]
    known = [value for value in measured if value is not None]
    if len(known) == len(group):
        return Cell(f"{span(known, lambda value: digits(value, 3))} tokens/s")
    predicted = [1 / entry.plan["decode_seconds"] for entry in group if entry.plan.get("decode_seconds")]
    if not predicted:
        return Cell("unknown")
    return Cell(f"≈ {span(predicted, lambda value: digits(value, 2))} tokens/s", True)


def digits(value: float, most: int) -> str:
    """Return a number with so many significant digits: 8.54, 85.4, 854, 8,540."""
    rounded = float(f"{value:.{most}g}")
    places = max(0, most - 1 - math.floor(math.log10(rounded))) if rounded > 0 else 0
    return f"{rounded:,.{places}f}"


def gibibytes(count: float) -> str:
    """Return a size in GiB: 0.5, 8, 24."""
    value = count / 2**30
    return f"{f'{value:.0f}' if value >= 9.95 else f'{value:.1f}'.removesuffix('.0')} GiB"


def span(values: Sequence[float], text: Callable[[float], str], between: str = "–") -> str:
    """Return "low–high unit" of several values, or the one that all are."""
    low, high = text(min(values)), text(max(values))
    if low == high:
        return low
    if low.partition(" ")[2] == high.partition(" ")[2]:
        low = low.partition(" ")[0]
    return f"{low}{between}{high}"


def sentences(report: Report) -> list[str]:
    """Return in two sentences what was done and how much quality it brings."""
    return [_compressed(report), _adapted(report)]


def _compressed(report: Report) -> str:
    bits = [entry.bits for entry in report.entries]
    configurations, devices = len({entry.config.hash for entry in report.entries}), len(report.entries)
    widths = span(bits, lambda value: f"{value:.1f} bits")
    if devices == 1:
        whom = f"for one device, the {label(report.entries[0])}"
    elif configurations == 1:
        whom = f"for {devices} devices, which all get the same version"
    else:
        whom = f"for {devices} devices, in {configurations} versions that differ in how precisely each layer is stored"
    return f"{model_name(report)} is compressed from 16 to {widths} per weight {whom}."


def _adapted(report: Report) -> str:
    trained = ""
    if len(report.trained) == 1:
        training = report.trained[0]
        trained = f", made by one training of {training.steps:,} steps ({_duration(training.seconds)})"
    each = "Each version has" if len({entry.config.hash for entry in report.entries}) > 1 else "It has"
    lora = f"{each} a small correction of its own, a LoRA{trained}"
    measured = [entry.quality for entry in report.entries if entry.quality is not None]
    which = "" if len(measured) == len(report.entries) else " where that was measured"
    if not measured:
        budgets = [(bits, quality) for trained in report.trained for bits, _, quality in trained.budgets]
        if not budgets:
            return f"{lora}; its quality is not measured yet."
        measured = [quality for _, quality in budgets]
        which = f", measured in versions of {span([bits for bits, _ in budgets], '{:.1f} bits'.format)}"
    if all(quality.task == "choice" for quality in measured):
        before, after = (
            span([score.get("accuracy", 0.0) for score in scores], lambda share: f"{100 * share:.0f} %")
            for scores in ([quality.quantized for quality in measured], [quality.adapted for quality in measured])
        )
        base = span([quality.base.get("accuracy", 0.0) for quality in measured], lambda share: f"{100 * share:.0f} %")
        return (
            f"{lora}; with it {after} of the questions are answered right, without it {before}, by the 16-bit original "
            f"{base}{which}."
        )
    before, after = (
        _beside_base([relative(quality, score) for quality, score in pairs])
        for pairs in ([(q, q.quantized) for q in measured], [(q, q.adapted) for q in measured])
    )
    return (
        f"{lora}; with it the perplexity (how uncertain the model is about the next word) is {after} that of the "
        f"16-bit original, without it {before}{which}."
    )


def _beside_base(changes: Sequence[float]) -> str:
    """Return relative changes in words: "17–30 % below", "between 2 % below and 5 % above"."""
    low, high = min(changes), max(changes)
    if low < 0 < high:
        return f"between {_share(-low)} below and {_share(high)} above"
    return f"{span([abs(low), abs(high)], _share)} {'below' if high <= 0 and low < 0 else 'above'}"


def _share(value: float) -> str:
    return f"{100 * value:,.0f} %"


def _duration(seconds: float) -> str:
    for limit, unit, name in ((90, 1, "seconds"), (5400, 60, "minutes"), (math.inf, 3600, "hours")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}" if unit < 3600 else f"{seconds / unit:.1f} {name}"
    return ""
