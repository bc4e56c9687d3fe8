"""The demo's picture: bits per layer of three GPUs, and perplexity without a LoRA, with the own and the neighbours'.

python examples/demo_picture.py RESULT.json PICTURE.svg     draws the picture of a finished demo again
"""

import io
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from demo_table import LEVEL, neighbour_text

__all__ = ["picture"]

STYLE = {
    "svg.fonttype": "none",  # text stays text: smaller, and read aloud
    "svg.hashsalt": "coatrt",
    "font.family": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 9,
    "text.color": "#1f2933",
    "axes.labelcolor": "#616e7c",
    "xtick.color": "#616e7c",
    "ytick.color": "#616e7c",
}
OWN, OTHERS, NONE = "#1a7f5a", "#e09f3e", "#8895a3"


def picture(result: Mapping[str, Any]) -> str:
    """Return the picture of a result (`result.json` of the demo) as SVG."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells everyone that it builds a font cache
    import matplotlib
    from matplotlib.figure import Figure

    rows = result["rows"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 1.0 + 1.7 * len(rows)), layout="constrained", facecolor="white")
        axes = figure.subplots(len(rows), 2, width_ratios=(3, 2), squeeze=False, sharex="col")
        for (left, right), row in zip(axes, rows, strict=True):
            image = _map(left, row)
            _perplexities(right, row, rows, result["fp16_perplexity"])
        axes[-1][0].set_xlabel("decoder layer")
        axes[-1][1].set_xlabel(f"perplexity over {result['tokens']:,} held-out tokens (lower is better)")
        axes[0][1].legend(*_legend(), loc="lower left", bbox_to_anchor=(0, 1.18), ncols=2, frameon=False, fontsize=8)
        bar = figure.colorbar(image, ax=axes[:, 0].tolist(), label="bits per weight", pad=0.01, aspect=40)
        bar.outline.set_visible(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _map(axis: Any, row: Mapping[str, Any]) -> Any:
    """Draw bits per weight of every matrix: module kinds down, layers across."""
    bits = row["bits_per_matrix"]
    image = axis.pcolormesh(list(bits.values()), vmin=2, vmax=8.5, cmap="viridis", edgecolors="white", linewidth=0.7)
    axis.invert_yaxis()
    axis.set_yticks([place + 0.5 for place in range(len(bits))], [kind.replace("_proj", "") for kind in bits])
    axis.tick_params(length=0, labelsize=7.5)
    axis.spines[:].set_visible(False)
    axis.set_title(f"{row['device']}, {row['bits']:.2f} bits per weight", loc="left", fontsize=9, weight="bold")
    return image


def _perplexities(axis: Any, row: Mapping[str, Any], rows: Any, base: float) -> None:
    """Draw a bar for each way to run a GPU's configuration, and a line where the model in fp16 is."""
    bars = [("no LoRA", row["without"], NONE, ""), ("own LoRA", row["with"], OWN, "")]
    for one in row["neighbours"]:
        bars.append(
            (
                f"LoRA of {one['device']}",
                one["perplexity"],
                OTHERS,
                neighbour_text(one).replace(LEVEL, "level with own"),
            )
        )
    most = max(base, *(max(row["with"], *(one["perplexity"] for one in row["neighbours"])) for row in rows))
    end = 1.45 * most  # a model that 2 bits have broken would dwarf all else: its bar is cut
    for place, (_, value, shade, text) in enumerate(bars):
        axis.barh(place, min(value, end), height=0.66, color=shade)
        text = text or (f"{value:.1f}" if value <= end else f"{value:,.0f} ▸")
        inside = value > 0.8 * end
        axis.text(
            min(value, end) + (-0.01 if inside else 0.01) * end,
            place,
            text,
            va="center",
            ha="right" if inside else "left",
            fontsize=8,
            color="white" if inside else "#1f2933",
            weight="bold" if shade == OWN else "normal",
            bbox=None if inside else {"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    axis.axvline(base, color="#1f2933", lw=1, ls=(0, (4, 3)))
    axis.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axis.invert_yaxis()
    axis.set_xlim(0, end)
    axis.tick_params(length=0, labelsize=7.5)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color("#e4e7eb")


def _legend() -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(color=NONE),
        Line2D([], [], color="#1f2933", lw=1, ls=(0, (4, 3))),
        Patch(color=OWN),
        Patch(color=OTHERS),
    ]
    return handles, ["quantized, no LoRA", "fp16, no LoRA", "LoRA emitted for it", "LoRA emitted for another GPU"]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(picture(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), encoding="utf-8")
