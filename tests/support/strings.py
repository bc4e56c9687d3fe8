"""The strings of the code: messages, help texts, docstrings."""

import ast
from collections.abc import Iterator
from pathlib import Path

__all__ = ["strings"]


def strings(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield place and text of every string below a folder, f-strings with "X" for each value."""
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parts_of = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            where = f"{path.relative_to(folder.parent)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.JoinedStr):
                texts = (part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
                yield where, "".join(map(str, texts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts_of:
                yield where, node.value
