"""The documents say what the results say, link to what exists, and are laid out for readers."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coatrt.devices.profiles import device_profiles
from support.documents import DOCUMENTS, ROOT, blocks, headings, prose

_MOST_COLUMNS = 7
_LONGEST_LINE = 120


def test_tables_are_what_the_results_say() -> None:
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_python_reference_is_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("python_reference", ROOT / "docs" / "python_reference.py")
    assert spec is not None and spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run python docs/python_reference.py"


def test_the_devices_are_counted() -> None:
    gpus = [profile for profile in device_profiles() if profile.id != "cpu"]
    assert f"({len(gpus)} NVIDIA GPUs and `cpu`)" in (ROOT / "docs/reference/devices.md").read_text(encoding="utf-8")


def test_documents_link_to_what_exists() -> None:
    for document in [*DOCUMENTS, ROOT / "CHANGELOG.md"]:
        for target, anchor in re.findall(r"\]\(([^)#:]*?)(?:#([^)]*))?\)", document.read_text(encoding="utf-8")):
            path = document.parent / target if target else document
            assert path.exists(), f"{document.name} links to {target}"
            if anchor:
                assert anchor in headings(path), f"{document.name} links to {target}#{anchor}"


def test_pages_link_to_pages_alone() -> None:
    """A link that leaves docs/ would work on a forge and not on the site: such files are named in code instead."""
    for document in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).resolve().is_relative_to(ROOT / "docs"), f"{document.name}: {target}"


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(DOCUMENTS) - 3
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=[\"']?(https?:[^\"' >]+)", text)
        loaded += re.findall(r"<link[^>]+href=[\"']?(https?:[^\"' >]+)[^>]*rel=[\"']?stylesheet", text)
        assert loaded == [], page.name


def test_documents_name_files_that_exist() -> None:
    folders = "coatrt|export|engines|tests|benchmarks|examples|docs"
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for name in re.findall(rf"`((?:{folders})/[\w./]+)`", text):
            assert (ROOT / name).exists() or "KIND" in name, f"{document.name} names {name}"
        for script in re.findall(r"(?:^|`)python ([\w/]+\.py)", text, re.MULTILINE):
            assert (ROOT / script).is_file() or script == "build_engine.py", f"{document.name} names {script}"


def test_code_names_pages_that_exist() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if name.endswith((".py", ".cpp", ".hpp", ".h", ".cmake", ".sh", ".md")) and (ROOT / name).is_file():
            for page in re.findall(r"(?<![\w/])docs/[\w/-]+\.md\b", (ROOT / name).read_text(encoding="utf-8")):
                assert (ROOT / page).is_file(), f"{name} names {page}"


def test_reasons_for_not_running_a_block_name_tests_that_exist() -> None:
    for document in DOCUMENTS:
        for block in blocks(document):
            for name in re.findall(r"[\w/]*test_\w+\.py", block.reason):
                assert list(ROOT.glob(f"tests/**/{Path(name).name}")), f"{document.name}:{block.line} names {name}"


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_and_tables_are_not_too_wide(document: Path) -> None:
    for number, line in prose(document):
        if line.startswith("|"):
            columns = len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) - 1
            assert columns <= _MOST_COLUMNS, f"{document.name}:{number}: {columns} columns"
        else:
            without_links = re.sub(r"\]\([^)]*\)|https?://\S+", "", line)  # they cannot be wrapped
            assert len(without_links) <= _LONGEST_LINE, f"{document.name}:{number}: {len(line)} characters"


def test_the_readme_is_read_in_two_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100
    assert len((ROOT / "docs/concepts/method.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_no_document_tells_people_to_install_coatrt_from_an_index() -> None:
    """Until the name is published: whoever registers it would run code on their machines."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert not re.search(r"(pip3?|pipx|uv) (install|run|add)( -\S+)* ['\"]?coatrt\b", text), document.name
