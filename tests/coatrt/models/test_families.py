"""The table of families and the documented lists agree."""

import re
from pathlib import Path

from coatrt.models.families import FAMILIES, LEFT_OUT

_DOCUMENT = Path(__file__).parents[3] / "docs" / "reference" / "models.md"


def _section(title: str) -> str:
    return _DOCUMENT.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]


def test_every_family_has_a_line_in_the_document() -> None:
    assert re.findall(r"^\| ([a-z]\w*) \|", _section("Families"), re.MULTILINE)[1:] == sorted(FAMILIES)


def test_what_is_left_out_is_documented_with_its_reason() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", _section("Families that are left out"), re.MULTILINE)[1:]
    assert {name: reason for reason, names in rows for name in names.split(", ")} == LEFT_OUT
