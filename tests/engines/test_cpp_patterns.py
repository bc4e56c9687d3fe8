"""Globs and the tokenizer's regular expressions in C++: what Python's match, in bounded time."""

import json
import os
import random
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any


def texts(rng: random.Random, alphabet: str, most: int) -> str:
    return "".join(rng.choices(alphabet, k=rng.randint(0, most)))


def test_globs_match_what_fnmatch_matches(cpp: Any, tmp_path: Path) -> None:
    rng = random.Random(0)
    pairs = [
        (texts(rng, "ab*?", 8), texts(rng, "ab", 8))
        if turn % 3
        else (texts(rng, r"aaabcz[[]]-!!*?^\&~|.é", 12), texts(rng, r"abcz[]-!^\&~|.é", 4))
        for turn in range(30_000)
    ]
    sets = ["[", "[]", "[!", "[!]", "[!]]", "[]-a]", "[a-]", "[-a]", "[b-a]", "[!b-a]", "[a-c-e]", "[!-x]", "[^a]"]
    sets += [r"[\]", "[--a]", "[a--]", "[b-a!x]", "[b-a!-z]", "[[]", "[a-z0-9_]", "a[", "[a", "[é-ÿ]", "[!é]"]
    pairs += [(pattern, name) for pattern in sets for name in [*map(chr, range(32, 127)), "é", "", "ab", "a[", "[a"]]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    found = cpp.probe("globs", tmp_path / "pairs.json")
    expected = [fnmatchcase(name, pattern) for pattern, name in pairs]
    assert [pair for pair, a, b in zip(pairs, found, expected, strict=True) if a != b] == []
    assert 2000 < sum(expected) < len(pairs) - 2000


def test_no_glob_takes_long(cpp: Any, tmp_path: Path) -> None:
    name = "a" * 2000
    pairs = [["(.*)*(.*)*(.*)*(.*)*x", name], ["*a" * 500 + "*b", name], ["[" * 8000, name], ["*" * 8000 + "b", name]]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    started = cpu_seconds()
    assert cpp.probe("globs", tmp_path / "pairs.json") == [False] * len(pairs)
    assert cpu_seconds() - started < 5  # sanitizers included


def test_expressions_that_backtrack_match_what_pythons_do(cpp: Any, tmp_path: Path) -> None:
    """Texts long enough that failures are noted; none may change what is found."""
    rng = random.Random(1)
    patterns = ["a*a*b|a", "a*(?:ab|b)?a*(?=b)a*b|[ab]", "(?:a*b|a*c)(?!a)|a+(?!b)|b", "a*(?:a*|b)(?:a|c)a*b|c+|a"]
    for pattern in patterns:
        given = ["a" * 100 + texts(rng, "aaaaaaaabc", 60) for _ in range(20)]
        (tmp_path / "texts.json").write_text(json.dumps(given))
        found = cpp.probe("split", pattern, tmp_path / "texts.json")
        expression = re.compile(pattern)
        for text, lengths in zip(given, found, strict=True):
            at = 0
            for length in lengths:
                match = expression.match(text, at)
                assert length == (match.end() - at if match else 0), (pattern, text, at)
                at += max(1, length)
            assert at >= len(text)


def cpu_seconds() -> float:
    """Return the CPU time of finished child processes: wall time says little on a busy machine."""
    times = os.times()
    return times.children_user + times.children_system


def test_a_pattern_that_backtracks_ends_in_time(cpp: Any, tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text(json.dumps(["a" * 600]))
    started = cpu_seconds()
    assert cpp.probe("split", "a*a*a*a*a*a*a*a*b|a+", tmp_path / "texts.json") == [[600]]
    assert cpu_seconds() - started < 5  # sanitizers included
    (tmp_path / "texts.json").write_text(json.dumps(["a" * 200_000]))
    started = cpu_seconds()
    line = cpp.refusal("split", "a*a*a*a*a*a*a*a*b", tmp_path / "texts.json")
    assert "takes too many steps on this text; shorten it or pass token ids" in line
    assert cpu_seconds() - started < 20
