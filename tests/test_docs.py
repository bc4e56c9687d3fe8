"""The documents say what the results say, and name only files that exist."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_tables_are_what_the_results_say() -> None:
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_documents_link_to_what_exists() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_documents_name_scripts_that_exist() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for script in re.findall(r"`python ([\w/]+\.py)", document.read_text(encoding="utf-8")):
            assert (ROOT / script).is_file(), f"{document.name} names {script}"


def test_documents_name_files_that_exist() -> None:
    folders = "coatrt|export|engines|tests|benchmarks|examples|docs"
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        if document.name == "CHANGELOG.md":
            continue
        for name in re.findall(rf"`((?:{folders})/[\w./]+)`", document.read_text(encoding="utf-8")):
            assert (ROOT / name).exists() or "KIND" in name, f"{document.name} names {name}"
