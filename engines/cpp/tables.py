"""Write src/tokenizer/unicode_tables.inc: the character classes of Hugging Face's own regular expressions, as ranges.

python engines/cpp/tables.py
"""

import unicodedata
from collections.abc import Callable
from pathlib import Path

from tokenizers import Regex, pre_tokenizers

TARGET = Path(__file__).parent / "src" / "tokenizer" / "unicode_tables.inc"
CODE_POINTS = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]


def ranges(name: str, holds: Callable[[int], bool]) -> str:
    """Return a table of the code points for which `holds` is true, as pairs of first and last."""
    found: list[list[int]] = []
    for point in filter(holds, CODE_POINTS):
        if found and found[-1][1] == point - 1:
            found[-1][1] = point
        else:
            found.append([point, point])
    rows = [", ".join(f"{{{a:#x}, {b:#x}}}" for a, b in found[i : i + 6]) for i in range(0, len(found), 6)]
    return f"constexpr Range {name}[] = {{\n    " + ",\n    ".join(rows) + "};\n"


def matched(pattern: str) -> Callable[[int], bool]:
    """Return whether Hugging Face's engine matches a code point."""
    split = pre_tokenizers.Split(Regex(pattern), "removed")
    return lambda point: not split.pre_tokenize_str(chr(point))


def second_of_a_composition() -> set[int]:
    """Return the code points that may join the character before them under NFC."""
    result = set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))
    for point in CODE_POINTS:
        parts = unicodedata.decomposition(chr(point)).split()
        if len(parts) == 2 and unicodedata.normalize("NFC", chr(point)) == chr(point):
            result.add(int(parts[1], 16))
    return result


def main() -> None:
    """Write the tables."""
    joins = second_of_a_composition()
    classes: dict[str, str] = {f"k{name}": rf"\p{{{name}}}" for name in ("L", "M", "N", "P", "S")}
    parts = [ranges(name, matched(pattern)) for name, pattern in (classes | {"kSpace": r"\s"}).items()]
    parts.append(ranges("kNotNfc", lambda p: p in joins or unicodedata.normalize("NFC", chr(p)) != chr(p)))
    marks = [(p, unicodedata.combining(chr(p))) for p in CODE_POINTS if unicodedata.combining(chr(p))]
    runs: list[list[int]] = []
    for point, order in marks:
        if runs and runs[-1][1] == point - 1 and runs[-1][2] == order:
            runs[-1][1] = point
        else:
            runs.append([point, point, order])
    rows = [", ".join(f"{{{a:#x}, {b:#x}, {c}}}" for a, b, c in runs[i : i + 5]) for i in range(0, len(runs), 5)]
    parts.append("constexpr Marks kMarks[] = {\n    " + ",\n    ".join(rows) + "};\n")
    TARGET.write_text("// Written by engines/cpp/tables.py.\n" + "".join(parts))


if __name__ == "__main__":
    main()
