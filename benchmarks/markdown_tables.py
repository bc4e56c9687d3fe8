"""What the files of tables share: results and Markdown."""

import json
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "grid", "load"]

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> Any:
    """Return a result."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def grid(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
