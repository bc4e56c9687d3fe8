"""What pip installs for each use: no torch in the base, one runtime at most, and no word of an index."""

import configparser
import re
from pathlib import Path

import pytest

from coatrt.system.extras import EXTRAS

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[1]
SETUP = configparser.ConfigParser(interpolation=None)
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")


def listed(text: str) -> set[str]:
    """Return the requirements of a list in setup.cfg."""
    return {line.strip() for line in text.splitlines() if line.strip()}


def names(requirements: set[str]) -> set[str]:
    """Return the packages of requirements."""
    return {re.split(r"[<>=;\s]", line)[0] for line in requirements}


NAMED = re.compile(r"pip install [^\n]*(?<!a checkout of )\bcoatrt|coatrt\[[a-z]")
"""coatrt by a name that pip would look up."""
BASE = listed(SETUP["options"]["install_requires"])
LISTS = {extra: listed(text) for extra, text in SETUP["options.extras_require"].items()}


def test_the_base_has_no_package_of_an_extra() -> None:
    extras = ("cpu", "cuda", "train", "report", "rtx", "tensorrt", "gguf", "sign", "eval", "all", "dev", "docs")
    assert set(LISTS) == set(extras)
    for extra in extras:
        assert not names(BASE) & names(LISTS[extra]), extra


def test_all_is_the_union_of_what_it_stands_for() -> None:
    parts = ("train", "report", "rtx", "gguf", "sign", "cuda")
    assert LISTS["all"] == set[str]().union(*(LISTS[part] for part in parts))


def test_a_runtime_comes_with_cpu_and_with_cuda_alone() -> None:
    """onnxruntime and onnxruntime-gpu own the same files: an extra that brought one would break the other's."""
    have = {extra for extra, lines in LISTS.items() if any(line.startswith("onnxruntime") for line in lines)}
    assert have == {"cpu", "cuda", "all"}
    assert names(LISTS["cpu"]) == {"onnxruntime"}


def test_messages_name_the_packages_that_an_extra_brings() -> None:
    for extra, modules in EXTRAS.items():
        assert set(modules.values()) == names(LISTS[extra]), extra


def test_nothing_names_coatrt_in_an_index() -> None:
    """Until coatrt is published, whoever took its name in an index would run code on the reader's machine."""
    endings = (".py", ".pyi", ".jinja", ".cpp", ".hpp", ".h", ".cmake", ".txt")
    parts = ("coatrt", "export", "engines", "examples", "benchmarks")
    paths = [path for part in parts for path in (ROOT / part).rglob("*") if path.suffix in endings]
    for path in (ROOT / "setup.cfg", ROOT / "Makefile", ROOT / ".ci" / "run", *paths):
        found = NAMED.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path}: {found and found[0]}"
