"""Run commands of coatrt while packages are not importable; as a program, it prints what became of each as JSON.

One process serves every case: what is imported already is put aside while it is blocked, so that torch is loaded once.
"""

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["run_without"]


class _Without:
    """A finder of modules that finds some packages no more."""

    def __init__(self, finder: Any, packages: Sequence[str]) -> None:
        self._finder, self._packages = finder, packages

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in self._packages else self._finder.find_spec(name, path, target)


@contextmanager
def without(packages: Sequence[str]) -> Iterator[None]:
    """Let imports of packages fail; coatrt itself is imported anew, since its modules hold theirs."""

    def taken(*names: str) -> dict[str, ModuleType]:
        found = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}
        for name in found:
            del sys.modules[name]
        return found

    taken("coatrt")
    aside, finders = taken(*packages), list(sys.meta_path)
    sys.meta_path[:] = [_Without(finder, packages) for finder in finders]
    try:
        yield
    finally:
        sys.meta_path[:] = finders
        taken("coatrt", *packages)
        sys.modules.update(aside)


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Run a command in this process and return its exit code, output and errors."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        kept = [os.dup(1), os.dup(2)]
        streams = sys.stdout, sys.stderr
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(out.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
        sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8")
        try:
            sys.argv = ["coatrt", *arguments]
            importlib.import_module("coatrt.cli.main").main()
            code: Any = 0
        except SystemExit as error:
            code = error.code or 0
        finally:
            sys.stdout.close()
            sys.stderr.close()
            sys.stdout, sys.stderr = streams
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
        said = []
        for file in (out, errors):
            file.seek(0)
            said.append(file.read().decode())
    return {"code": code, "out": said[0], "err": said[1], "torch": "torch" in sys.modules}


def run_without(cases: Sequence[tuple[Sequence[str], Sequence[str]]], work: Path) -> list[dict[str, Any]]:
    """Return what became of each case in a process of its own.

    Args:
        cases: packages that are not importable, and the command.
        work: a directory for the questions and answers.
    """
    import subprocess

    question, answer = work / "cases.json", work / "answers.json"
    question.write_text(json.dumps([[list(packages), list(command)] for packages, command in cases]))
    command = [sys.executable, __file__, str(question), str(answer)]
    subprocess.run(command, check=True, cwd=work, timeout=600)
    return [json.loads(line) for line in answer.read_text().splitlines()]


def main() -> None:
    """Answer the cases of a file in another, a line each."""
    with Path(sys.argv[2]).open("w", encoding="utf-8") as answers:
        for packages, command in json.loads(Path(sys.argv[1]).read_text()):
            with without(packages):
                started = time.process_time()
                answer = run(command) | {"cpu_seconds": time.process_time() - started}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
