"""Tables of plain text."""

from collections.abc import Sequence

__all__ = ["aligned"]


def aligned(rows: Sequence[Sequence[str]], columns: str) -> str:
    """Return rows as lines whose cells stand below each other, two spaces apart.

    Args:
        rows: cells as text, the head among them.
        columns: a character per column: "<" aligns it left, ">" right.
    """
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, columns, widths, strict=True)).rstrip()
        for row in rows
    )
