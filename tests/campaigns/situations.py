"""Run commands on full and read-only disks, without a home, told to end, with nobody to read: one line each.

    python tests/campaigns/situations.py -o situations.json

prints the table of docs/reference/errors.md. Disks are tmpfs mounts: it needs root, and says what it left out without.
"""

import argparse
import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.commands import Inputs, import_everything, run_command  # noqa: E402
from support.kills import leftovers  # noqa: E402

_BYTES = 2000  # that a file may have
_NOBODY = 12345  # no entry in passwd
_IS_ROOT = os.geteuid() == 0
_LONG = ("train", "search", "export", "build", "devices calibrate")


@dataclass(frozen=True)
class Outcome:
    """What a command did in a situation.

    Args:
        situation: in words.
        command: its name, with the option that matters.
        code: exit code.
        lines: what it printed on standard error, paths by their names.
        problem: what is wrong with that; empty where nothing is.
    """

    situation: str
    command: str
    code: int
    lines: tuple[str, ...]
    problem: str = ""


class Situations:
    """Inputs and a folder to work in; each method runs one command in one situation."""

    def __init__(self, inputs: Inputs, folder: Path) -> None:
        self.inputs, self.folder = inputs, folder
        self.out, self.cache, self.temporary = folder / "out", folder / "cache", folder / "tmp"
        self.outcomes: list[Outcome] = []

    def commands(self) -> dict[str, list[object]]:
        """Return each command, writing into `out`."""
        found, out = self.inputs, self.out
        adapter = out / "adapter"  # of search, which writes into it
        return {
            "train": found.train(out / "new"),
            "search": ["search", adapter, "--data", found.text, "--evaluations", 3, "--blocks", 2, "--max-length", 32],
            "plan -o": ["plan", found.adapter, "--target", "t4", "-o", out / "plan.json"],
            "export": ["export", found.adapter, "--config", found.config, "-o", out / "graphs"],
            "export --format genai": ["export", found.bundle, "--format", "genai", "-o", out / "genai"],
            "export --format ortpackage": ["export", found.bundle, "--format", "ortpackage", "-o", out / "package"],
            "build": ["build", found.adapter, "--target", "cpu", "-o", out / "bundle"],
            "adapt": ["adapt", found.bundle, "-o", out / "lora.safetensors"],
            "adapt --format peft": ["adapt", found.bundle, "-o", out / "peft", "--format", "peft"],
            "adapt --format onnx-adapter": ["adapt", found.bundle, "-o", out / "lora", "--format", "onnx-adapter"],
            "bench -o": ["bench", found.bundle, "--tokens", 1, "--repeat", 1, "--prompt", 4, "-o", out / "bench.json"],
            "report": ["report", found.bundle, "-o", out / "report.html"],
            "devices calibrate": ["devices", "calibrate", found.adapter],
        }

    @contextlib.contextmanager
    def _place(self, disks: Sequence[Path] = (), options: str = "size=16m") -> Iterator[None]:
        """Make the folders anew, some of them as disks of their own."""
        for folder in (self.out, self.cache, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        for disk in disks:
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True)
        try:
            shutil.copytree(self.inputs.adapter, self.out / "adapter")
            yield
        finally:
            for disk in disks:
                subprocess.run(["umount", "-l", str(disk)], check=True)

    def run(
        self, situation: str, command: str, codes: int | tuple[int, ...], prepare: Callable[[], object] = lambda: None,
        *, names: Path | None = None, limit: int = 1, **more: Any,
    ) -> None:  # fmt: skip
        """Run a command, and take note of what is wrong: another exit code, a traceback, more lines than `limit`.

        Args:
            situation: in words.
            command: its key in `commands`.
            codes: exit codes that are right.
            prepare: called in its process before.
            names: a path that its line must name.
            limit: most lines.
            more: of `run_command`.
        """

        def begin() -> None:
            os.environ["COATRT_CACHE"], tempfile.tempdir = str(self.cache), str(self.temporary)
            prepare()

        said = self.folder / "said"
        said.unlink(missing_ok=True)
        code = run_command(self.commands()[command], begin, output=self.folder / "shown", errors=said, **more)
        self.note(situation, command, code, said.read_text(errors="replace"), codes, names, limit)

    def note(
        self, situation: str, command: str, code: int, said: str, codes: int | tuple[int, ...], names: Path | None,
        limit: int = 1,
    ) -> None:  # fmt: skip
        """Judge what a command did, and keep it."""
        right = (codes,) if isinstance(codes, int) else codes
        problem = ""
        if code not in right:
            problem = f"exit code {code}, not {right}"
        elif "Traceback" in said or len(said.splitlines()) > limit:
            problem = f"{len(said.splitlines())} lines"
        elif code == 2 and not said.startswith("coatrt: "):
            problem = "no line"
        elif code in (0, 2) and names is not None and str(names) not in said and (said or code):
            problem = f"{names} is not named"
        if problem:
            problem += f": {said[-1500:]}"
        for path, name in (
            (self.out, "OUT"),
            (self.cache, "CACHE"),
            (self.temporary, "TMP"),
            (self.inputs.folder, "IN"),
        ):
            said = said.replace(str(path), name)
        self.outcomes.append(Outcome(situation, command, code, tuple(said.splitlines()), problem))

    def disks(self, commands: Sequence[str]) -> None:
        """Outputs, then the cache, on disks that are full, without inodes, or read-only."""
        for kind, break_disk in (("is full", fill), ("has no inodes left", use_inodes), ("is read-only", freeze)):
            for command in commands:
                place = self.cache if command == "devices calibrate" else self.out
                lines = 2 if place is self.cache else 1  # codes cannot be kept either
                options = "size=16m,nr_inodes=400"
                with self._place([place], options):
                    break_disk(place)
                    self.run(f"the disk of the output {kind}", command, 2, names=place, limit=lines)
            for command in [name for name in commands if name in ("train", "search", "export", "build")]:
                with self._place([self.cache], options):
                    break_disk(self.cache)
                    self.run(f"the disk of the cache {kind}", command, 0, names=self.cache)
        if "devices calibrate" in commands:
            with self._place([self.temporary]):
                fill(self.temporary)
                self.run("the disk of temporary files is full", "devices calibrate", 2, names=self.temporary)

    def limits(self, commands: Sequence[str]) -> None:
        """Files of at most a few bytes (ulimit -f), for outputs and cache alike."""
        for command in commands:
            with self._place():

                def limit() -> None:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (_BYTES, _BYTES))

                place = self.cache if command == "devices calibrate" else self.out
                where = None if place is self.cache or command in ("train", "search", "export", "build") else place
                many = 2 if where is None else 1  # the cache's warning comes first
                self.run("files may have 2 kB (ulimit -f)", command, (0, 2), limit, names=where, limit=many)

    def others(self, commands: Sequence[str]) -> None:
        """As a user without a home or an entry in passwd, in directories of one's own, then of someone else."""

        def nobody(**variables: str) -> None:
            for name in ("HOME", "COATRT_CACHE", "XDG_CACHE_HOME", "USER", "LOGNAME"):
                os.environ.pop(name, None)
            os.environ |= variables
            from coatrt.engines.bundles import contents

            # It starts a Python process, which this user cannot where Python lies in the home of another one.
            contents.chat_template = lambda _: None  # type: ignore[assignment]
            os.setgroups([])
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)

        def homeless() -> None:
            nobody(XDG_CACHE_HOME=str(self.cache))

        for command in commands:
            with self._place():
                own(self.out, self.cache, self.temporary)
                self.run("no HOME, no passwd entry, XDG_CACHE_HOME set", command, 0, homeless, limit=0)
            place = self.cache if command == "devices calibrate" else self.out
            with self._place():
                own(*({self.out, self.cache, self.temporary} - {place}))
                self.run(
                    "the directory belongs to someone else",
                    command,
                    2,
                    homeless,
                    names=place,
                    limit=1 + (place is self.cache),
                )
        for command in [name for name in commands if name in ("train", "build")]:
            with self._place():
                own(self.out, self.temporary)
                self.run("no HOME, no passwd entry, no XDG_CACHE_HOME", command, 2, nobody)

    def signals(self, commands: Sequence[str]) -> None:
        """SIGTERM and SIGINT, as soon as a command writes, or after 0.12 s; again if it was done before that."""
        for number in (signal.SIGTERM, signal.SIGINT):
            for command in commands:
                for attempt in range(10):
                    with self._place():
                        before = self._names()

                        def end(child: int, number: int = number, before: set[Path] = before) -> None:
                            latest = time.monotonic() + 0.12
                            while time.monotonic() < latest and self._names() == before:
                                time.sleep(0.001)
                            os.kill(child, number)

                        self.run(f"told to end ({number.name})", command, 128 + number, started=end, limit=0)
                        last = self.outcomes[-1]
                        if left := leftovers(self.folder):
                            self.outcomes[-1] = Outcome(*_facts(last), f"left {left}")
                    if last.code or attempt == 9:
                        break
                    self.outcomes.pop()

    def _names(self) -> set[Path]:
        return {path for folder in (self.out, self.cache, self.temporary) for path in folder.iterdir()}

    def readers(self, commands: dict[str, list[object]]) -> None:
        """Standard output closed by its reader, and full."""
        with self._place():
            for name, arguments in commands.items():
                line = [sys.executable, "-m", "coatrt", *map(str, arguments)]
                environment = {**os.environ, "COATRT_CACHE": str(self.cache)}
                for situation, redirect, codes in (
                    ("standard output is closed by its reader", "| head -0", (0, 1)),
                    ("standard output is full (/dev/full)", "> /dev/full", (2,)),
                ):
                    script = f'set -o pipefail; "$@" {redirect}'
                    asked = ["bash", "-c", script, "bash", *line]
                    done = subprocess.run(asked, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
                    self.note(situation, name, done.returncode, done.stderr, codes, None)


def _facts(outcome: Outcome) -> tuple[str, str, int, tuple[str, ...]]:
    return outcome.situation, outcome.command, outcome.code, outcome.lines


def fill(disk: Path) -> None:
    """Write until nothing more fits."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(1 << 12))


def use_inodes(disk: Path) -> None:
    """Make files until there can be no more."""
    try:
        for number in range(1 << 20):
            (disk / f"filler-{number}").touch()
    except OSError as error:
        assert error.errno == errno.ENOSPC


def freeze(disk: Path) -> None:
    """Make a disk read-only."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def own(*folders: Path) -> None:
    """Give folders to the user without a home."""
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, _NOBODY, _NOBODY)


def campaign(folder: Path, *, short: bool = False) -> list[Outcome]:
    """Run every situation, or a few, and return what came of them."""
    folder.chmod(0o755)
    inputs = Inputs(folder / "inputs")
    found = Situations(inputs, folder / "work")
    commands = list(found.commands())
    if short:
        commands = ["train", "build", "adapt"]
    if _IS_ROOT:
        found.disks(commands)
        found.others(commands)
    found.limits(commands)
    found.signals([name for name in commands if name in _LONG])
    light: dict[str, list[object]] = {"devices": ["devices"]}
    if not short:
        light["plan"] = ["plan", inputs.adapter, "--target", "t4"]
        light["verify"] = ["verify", inputs.bundle]
        light["run"] = ["run", inputs.bundle, "-p", "the cat", "--max-tokens", 4]
        light["adapt"] = ["adapt", inputs.bundle, "-o", found.out / "l"]
    found.readers(light)
    return found.outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a Markdown table, commands of the same outcome in one row."""
    rows: dict[tuple[str, int, str], list[str]] = {}
    for outcome in outcomes:
        said = outcome.lines[-1] if outcome.lines else ""
        said = re.sub(r"(OUT|CACHE)/[^ ]+ ", "PATH ", said)
        rows.setdefault((outcome.situation, outcome.code, said), []).append(outcome.command)
    lines = ["| situation | commands | exit code | standard error |", "|---|---|---|---|"]
    for (situation, code, said), commands in rows.items():
        lines.append(f"| {situation} | {', '.join(commands)} | {code} | {f'`{said}`' if said else 'nothing'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="JSON file of the outcomes")
    parser.add_argument("--short", action="store_true", help="the few that CI runs")
    options = parser.parse_args()
    import_everything()
    with tempfile.TemporaryDirectory(prefix="situations-") as folder:
        outcomes = campaign(Path(folder), short=options.short)
    if options.output is not None:
        options.output.write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=1) + "\n")
    print(table(outcomes))
    wrong = [outcome for outcome in outcomes if outcome.problem]
    print(f"{len(outcomes)} situations, {len(wrong)} wrong", file=sys.stderr)
    for outcome in wrong:
        print(f"{outcome.situation}, {outcome.command}: {outcome.problem}", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
