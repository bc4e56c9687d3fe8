"""Documents, help texts, messages and docstrings have none of the phrases that readers stumble over."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.documents import DOCUMENTS, ROOT, prose
from support.strings import strings

_THINGS = (
    "adapter|archive|bundle|checkpoint|configuration|decoder|device|directory|engine|file|format|graph|hub name|"
    "integer|JSON|list|manifest|matrix|model|multiple|name|number|object|option|path|plan|profile|product|regular|"
    "safetensors|text|token|UTF-8|valid|weight format"
)
PHRASES = {
    r"\bwhat (that|this|it) (does not show|is worth)\b": "Limitations: …; How it compares with …",
    r"\blearnt badly\b": "failed to converge",
    r"\b(they )?set(s)? up `\.venv`": "creates `.venv`",
    r"\bthe (room|rights) there\b|\broom for it there\b": "free disk space, permissions",
    r"\b(do|does) not suffice\b": "not enough …",
    r"\b(is|are) given; (give|allowed|choose|take|use)\b": "X must be …, got …",
    rf"(?<!there )\b(is|are) no ({_THINGS})s?\b": "not a bundle: PATH",
    r"\bsay on standard error that\b|\b(CPU|GPU) is to compute\b": "warn that …",
    r"\bhave the (current|old) \w+ again\b": "restore …",
    r"\bgone on with\b": "resumed",
    r"\bnot to be written to\b": "read-only",
    r"\bof like (length|size)\b": "of similar length",
    r"\bin closed form; on\.": "closed-form … (default: on)",
    r"\bpip3? install ['\"]?coatrt\b": "in a checkout: pip install '.[extra]'",
}
"""Regular expressions, and what to write instead."""


def found(text: str) -> Iterator[str]:
    """Yield the phrases in a text, each with what to write instead."""
    text = re.sub(r"\s+", " ", text)
    for pattern, instead in PHRASES.items():
        for match in re.finditer(pattern, text, re.IGNORECASE):
            yield f"…{text[max(0, match.start() - 40) : match.end() + 20]}…: {instead}"


def test_the_phrases_are_found() -> None:
    for text in ("X is no bundle", "the machine's memory does not suffice", "context 0 is given; give at least 1"):
        assert list(found(f"{text} now")), text
    assert list(found("there is no engine here, and it is no longer slow")) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_are_in_plain_words(document: Path) -> None:
    assert list(found("\n".join(line for _, line in prose(document)))) == []


@pytest.mark.parametrize("folder", ["coatrt", "export", "engines", "examples"])
def test_code_speaks_in_plain_words(folder: str) -> None:
    wrong = [f"{where}: {line}" for where, text in strings(ROOT / folder) for line in found(text)]
    assert wrong == []


def test_troubleshooting_quotes_messages_that_exist() -> None:
    """A message is quoted in the first column, with … for what varies."""
    known = "\n".join(text for folder in ("coatrt", "export", "engines") for _, text in strings(ROOT / folder))
    quoted = []
    for _, line in prose(ROOT / "docs/troubleshooting.md"):
        if match := re.match(r"\| `([^`]+)` \|", line):
            quoted.append(match[1])
            for part in match[1].split("…"):
                if part := part.strip(" ;"):
                    assert part in known, f"no message has: {part}"
    assert len(quoted) > 30
