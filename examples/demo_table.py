"""The demo's result: one row per GPU, what its differences are worth, and the table that shows both."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FP16",
    "LEVEL",
    "beaten",
    "difference",
    "formats_text",
    "found",
    "neighbour_text",
    "perplexity",
    "result_row",
    "table",
    "table_cells",
]

FP16 = "fp16 base"
LEVEL = "level"
"""Stands in the table for a neighbour's perplexity that the data cannot tell from that of the GPU's own LoRA."""

Losses = NDArray[np.float64]
"""Nats per token of each block of held-out text; all blocks have equally many tokens."""


def perplexity(losses: Losses) -> float:
    """Return the perplexity over all blocks."""
    return math.exp(float(losses.mean()))


def difference(losses: Losses, others: Losses) -> tuple[float, float]:
    """Return the mean of the differences in nats per token, and its standard error over blocks: both read one text."""
    paired = losses - others
    return float(paired.mean()), float(paired.std(ddof=1)) / math.sqrt(len(paired))


def result_row(
    facts: Mapping[str, Any], base: Losses, without: Losses, own: Losses, neighbours: Mapping[str, Losses]
) -> dict[str, Any]:
    """Return the row of a GPU.

    Args:
        facts: "device", "bits", "formats" and "engine_bytes", which the row begins with.
        base: losses of the model in fp16.
        without: of the quantized model.
        own: with the LoRA emitted for this GPU's configuration.
        neighbours: device → with the LoRA emitted for that device's configuration.
    """
    rows = []
    for device, losses in neighbours.items():
        nats, error = difference(losses, own)
        rows.append({"device": device, "perplexity": perplexity(losses), "nats_behind": nats, "standard_error": error})
    nats, error = difference(base, own)
    return {
        **facts,
        "without": perplexity(without),
        "with": perplexity(own),
        "nats_below_base": nats,
        "standard_error": error,
        "neighbours": rows,
    }


def neighbour_text(neighbour: Mapping[str, Any]) -> str:
    """Return a neighbour's perplexity, or that it is level with the GPU's own LoRA (within two standard errors)."""
    if abs(neighbour["nats_behind"]) <= 2 * neighbour["standard_error"]:
        return LEVEL
    return f"{neighbour['perplexity']:.1f}"


def formats_text(formats: Mapping[str, int]) -> str:
    """Return how many matrices have each kind of format ("int4-g64" is an int4), the fewest bits first."""
    kinds: dict[str, int] = {}
    for name, count in formats.items():
        kind = name.partition("-")[0]
        kinds[kind] = kinds.get(kind, 0) + count
    return ", ".join(f"{kinds[kind]} {kind}" for kind in sorted(kinds, key=_bits))


def _bits(kind: str) -> int:
    return int("".join(filter(str.isdigit, kind)))


def table_cells(rows: Sequence[Mapping[str, Any]], base: float) -> list[list[str]]:
    """Return the table's rows: GPU, bits, matrices, engine MB, perplexity with no LoRA, its own, its neighbours'."""
    cells = [
        [
            row["device"],
            f"{row['bits']:.2f}",
            formats_text(row["formats"]),
            f"{row['engine_bytes'] / 1e6:.1f}",
            f"{row['without']:.1f}",
            f"{row['with']:.1f}",
            " and ".join(map(neighbour_text, row["neighbours"])),
        ]
        for row in rows
    ]
    return [*cells, [FP16, "16.00", "", "", f"{base:.1f}", "", ""]]


def table(rows: Sequence[Mapping[str, Any]], base: float) -> str:
    """Return the result as text."""
    head = ["GPU", "bits", "matrices", "engine MB", "no LoRA", "own LoRA", "neighbours' LoRA"]
    cells = table_cells(rows, base)
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, "<><>>>>", widths, strict=True)).rstrip()
        for row in [head, *cells]
    )


def beaten(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the neighbours whose LoRA does worse on this GPU than its own, by more than two standard errors."""
    return [one for one in row["neighbours"] if one["nats_behind"] > 2 * one["standard_error"]]


def found(rows: Sequence[Mapping[str, Any]], base: float, tokens: int) -> list[str]:
    """Return what the result says, a sentence a line."""
    small = min(rows, key=lambda row: row["bits"])
    lines = [
        f"{small['device']}: {small['bits']:.2f} bits per weight raise perplexity from {base:.1f} to "
        f"{small['without']:.1f}; its own LoRA brings it to {small['with']:.1f},",
        f"{small['nats_below_base']:.3f} ± {small['standard_error']:.3f} nats per token better than the model in fp16.",
    ]
    for one in beaten(small):
        lines.append(
            f"The LoRA of the {one['device']} does less for it: {one['perplexity']:.1f}, "
            f"{one['nats_behind']:.3f} ± {one['standard_error']:.3f} nats per token behind its own."
        )
    lines.append(f"All numbers are over the same {tokens:,} tokens, so differences are paired; ± is one standard error")
    lines.append(f'over blocks of text, and "{LEVEL}" means closer than two of them.')
    return lines
