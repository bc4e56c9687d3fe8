"""Write src/tokenizer/unicode_tables.inc: character classes as Hugging Face has them, and what NFC needs.

python tests/engines/cpp/unicode_tables.py
"""

import unicodedata
from collections.abc import Callable
from pathlib import Path

from tokenizers import Regex, normalizers, pre_tokenizers

TARGET = Path(__file__).parents[3] / "engines" / "cpp" / "src" / "tokenizer" / "unicode_tables.inc"
CODE_POINTS = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]


def ranges(name: str, holds: Callable[[int], bool]) -> str:
    """Return a table of the code points for which `holds` is true, as pairs of first and last."""
    found: list[list[int]] = []
    for point in filter(holds, CODE_POINTS):
        if found and found[-1][1] == point - 1:
            found[-1][1] = point
        else:
            found.append([point, point])
    return rows(name, "Range", [f"{{{a:#x}, {b:#x}}}" for a, b in found], 6)


def matched(pattern: str) -> Callable[[int], bool]:
    """Return whether Hugging Face's engine matches a code point."""
    split = pre_tokenizers.Split(Regex(pattern), "removed")
    return lambda point: not split.pre_tokenize_str(chr(point))


def rows(name: str, kind: str, cells: list[str], width: int) -> str:
    """Return a table of cells."""
    lines = [", ".join(cells[i : i + width]) for i in range(0, len(cells), width)]
    return f"constexpr {kind} {name}[] = {{\n    " + ",\n    ".join(lines) + "};\n"


def decompositions() -> tuple[list[str], list[str]]:
    """Return canonical decompositions in full, and the pairs that compose; Hangul is arithmetic and left out."""
    nfd, nfc = normalizers.NFD(), normalizers.NFC()
    apart, pairs = [], []
    for point in CODE_POINTS:
        parts = nfd.normalize_str(chr(point))
        if parts == chr(point) or 0xAC00 <= point < 0xD7A4:
            continue
        apart.append(f"{{{point:#x}, {{{', '.join(f'{ord(part):#x}' for part in parts)}}}}}")
        head = nfc.normalize_str(parts[:-1])
        if len(parts) > 1 and len(head) == 1 and nfc.normalize_str(chr(point)) == chr(point):
            pairs.append((ord(head), ord(parts[-1]), point))
    return apart, [f"{{{a:#x}, {b:#x}, {c:#x}}}" for a, b, c in sorted(pairs)]


def main() -> None:
    """Write the tables."""
    classes: dict[str, str] = {f"k{name}": rf"\p{{{name}}}" for name in ("L", "M", "N", "P", "S")}
    parts = [ranges(name, matched(pattern)) for name, pattern in (classes | {"kSpace": r"\s"}).items()]
    marks = [(p, unicodedata.combining(chr(p))) for p in CODE_POINTS if unicodedata.combining(chr(p))]
    runs: list[list[int]] = []
    for point, order in marks:
        if runs and runs[-1][1] == point - 1 and runs[-1][2] == order:
            runs[-1][1] = point
        else:
            runs.append([point, point, order])
    parts.append(rows("kMarks", "Marks", [f"{{{a:#x}, {b:#x}, {c}}}" for a, b, c in runs], 5))
    apart, pairs = decompositions()
    parts.append(rows("kApart", "Apart", apart, 4))
    parts.append(rows("kPairs", "Pair", pairs, 4))
    TARGET.write_text("// Written by tests/engines/cpp/unicode_tables.py.\n" + "".join(parts))


if __name__ == "__main__":
    main()
