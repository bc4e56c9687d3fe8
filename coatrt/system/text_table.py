"""Tables of plain text."""

from collections.abc import Sequence

__all__ = ["aligned"]


def aligned(rows: Sequence[Sequence[str]], columns: str) -> str:
    """Return rows as lines with aligned columns, two spaces apart.

    Args:
        rows: cells as text, header included.
        columns: one character per column: "<" for left, ">" for right alignment.
    """
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, columns, widths, strict=True)).rstrip()
        for row in rows
    )
