"""Run the shell and Python blocks of the documents, page by page, on a tiny model.

python tests/campaigns/documents.py -o RESULT.json [PAGE …]

Every page runs in a folder of its own with what the pages name: the model MODEL, texts/, held-out/, and talks.jsonl and
questions.jsonl (the examples in docs/guides/tasks.md). All pages but the first three find the adapter and the bundles
that the quickstart leaves. Commands of coatrt run in copies of one process, with options that make them short;
everything else runs in bash. Blocks in other languages, and those that say why they are not run, are left out.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.commands import import_everything, run_command  # noqa: E402
from support.documents import Block, blocks  # noqa: E402
from support.kills import fork  # noqa: E402
from support.tiny import save_tiny_llama  # noqa: E402

PAGES = (
    "README.md",
    "docs/quickstart.md",
    "docs/guides/train.md",
    *("docs/guides/tasks.md", "docs/guides/plan.md", "docs/guides/build-a-fleet.md"),
    "docs/guides/checkpoints.md",
    *("docs/guides/deploy-python.md", "docs/guides/serve.md", "docs/guides/deploy-cpp.md", "docs/guides/jetson.md"),
    "docs/guides/onnxruntime-genai.md",
    "docs/concepts/security.md",
)
_FROM_NOTHING = PAGES[:3]
_BUILDS_ENGINES = ("docs/quickstart.md", "docs/guides/jetson.md")
SHORT = {
    "train": "--steps 2 --checkpoint-every 1 --batch 2 --max-length 96 --calibration 20 --evaluation 2",
    "search": "--evaluations 2 --blocks 1 --max-length 16",
    "bench": "--tokens 2 --repeat 1 --prompt 4",
    "run": "--max-tokens 2 --context 64",
}
"""Options that are added to commands; the last of two equal ones counts."""
SHORT_PYTHON = {"steps=40": "steps=2", "max_length=128": "max_length=32, calibration=20, evaluation=2", "128)": "32)"}
"""What is replaced in Python blocks."""


def main() -> None:
    """Run the pages and write what failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", default=PAGES)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    import_everything()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Pages(Path(folder)).run(arguments.pages)
    arguments.output.write_text(json.dumps(outcomes, indent=1))
    for row in outcomes:
        print(f"{row['page']}:{row['line']}: {'failed' if row['problem'] else 'ran'} in {row['seconds']:.1f} s")


class Pages:
    """Pages that run in folders of their own.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._bare, self._after_quickstart = folder, folder / "bare", folder / "quickstart.md"
        os.environ["COATRT_CACHE"] = str(folder / "cache")
        (self._bare / "texts").mkdir(parents=True)
        (self._bare / "held-out").mkdir()
        assert fork(lambda: save_tiny_llama(self._bare / "MODEL")) == 0
        for number, word in enumerate(("cat", "dog", "hen", "owl", "fox", "bee", "cow", "ant", "rat", "pig")):
            (self._bare / "texts" / f"{number}.txt").write_text(f"{word} the {word} sat on the mat. " * 30)
        (self._bare / "held-out" / "0.txt").write_text("cat the elk sat on the mat. " * 60)
        talks, questions = (block.text for block in blocks(ROOT / "docs/guides/tasks.md") if block.language == "json")
        (self._bare / "talks.jsonl").write_text(talks * 8)
        (self._bare / "questions.jsonl").write_text(questions * 8)

    def run(self, pages: Sequence[str]) -> list[dict[str, Any]]:
        """Run pages, and the quickstart before those that take up its result."""
        outcomes = []
        for page in pages:
            if page not in _FROM_NOTHING and not self._after_quickstart.exists():
                outcomes += self._page("docs/quickstart.md")
            outcomes += self._page(page)
        return outcomes

    def _page(self, page: str) -> list[dict[str, Any]]:
        """Run the blocks of a page until one fails."""
        here = self._folder / Path(page).name
        if here.exists():  # the quickstart, for another page
            return []
        shutil.copytree(self._bare if page in _FROM_NOTHING else self._after_quickstart, here)
        outcomes = []
        for block in blocks(ROOT / page):
            if block.reason or block.language not in ("sh", "python"):
                continue
            started = time.monotonic()
            work = self._python if block.language == "python" else self._shell
            problem = work(block, here, page)
            row = {"page": page, "line": block.line, "problem": problem, "seconds": time.monotonic() - started}
            outcomes.append(row)
            if problem:
                break
        return outcomes

    def _python(self, block: Block, here: Path, page: str) -> str:
        text = block.text
        for long, short in SHORT_PYTHON.items():
            text = text.replace(long, short)

        def work() -> None:
            log = os.open(here / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(here)
            exec(compile(text, f"{page}:{block.line}", "exec"), {"__name__": "__main__"})

        return "" if fork(work) == 0 else (here / "log").read_text()[-3000:]

    def _shell(self, block: Block, here: Path, page: str) -> str:
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            if words[0] != "coatrt" or {"|", "&&", ";", ">"} & set(words):
                done = subprocess.run(["bash", "-ec", line], cwd=here, capture_output=True, text=True, check=False)
                code, printed = done.returncode, done.stderr
            else:
                code = run_command(shortened(words[1:], page), lambda: os.chdir(here), output=here / "log")
                printed = (here / "log").read_text()
            if code:
                return f"{line}\nended with {code}:\n{printed[-3000:]}"
        return ""


def shortened(words: list[str], page: str) -> list[str]:
    """Return the arguments of a command with those that make it short."""
    words = [*words, *shlex.split(SHORT.get(words[0], ""))]
    if words[0] == "verify" and "--data" in words:
        words += ["--examples", "2", "--max-length", "32"]
    if words[0] == "train" and "--formats" not in words:
        words += ["--formats", "nf3-g64,int4-g64,int8"]
    if words[0] == "build" and page not in _BUILDS_ENGINES and not re.search("--(no-engine|dry-run)", " ".join(words)):
        words.append("--no-engine")
    return words


if __name__ == "__main__":
    main()
