"""The documents: their files, their code blocks, and their lines of prose."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DOCUMENTS", "ROOT", "Block", "blocks", "headings", "prose"]

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"\s*```(\w*)")
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Args:
        language: behind the fence; empty where there is none.
        text: what is between the fences.
        line: number of the first line of `text`, from 1.
        reason: why no test runs it, from a comment `<!-- not run: REASON -->` on the line before; empty without one.
    """

    language: str
    text: str
    line: int
    reason: str


def blocks(path: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a document."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        match = _FENCE.match(line)
        if match is None:
            continue
        if start is None:
            start = number
            continue
        language = _FENCE.match(lines[start])
        assert language is not None
        reason = _NOT_RUN.fullmatch(lines[start - 1].strip())
        text = "\n".join(lines[start + 1 : number]) + "\n"
        yield Block(language[1], text, start + 2, reason[1] if reason else "")
        start = None
    assert start is None, f"{path}: a fence is not closed"


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of every line outside of code, tables included."""
    inside = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            yield number, line


def headings(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub and GitLab make them."""
    titles = (match[1] for _, line in prose(path) if (match := re.match(r"#+ (.+)", line)))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
