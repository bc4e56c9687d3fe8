"""Kill commands at random moments and at every rename: the next run ends with the same result, and nothing stays.

python tests/campaigns/kills.py --kills 200 -o kills.json
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.commands import Inputs, content, import_everything, run_command  # noqa: E402
from support.kills import arm, leftovers  # noqa: E402

_RENAMES = ("rename", "replace")
_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_MINE = {"notes.txt": b"mine", "mine/deep.txt": b"mine too"}


@dataclass
class Scenario:
    """A command that is killed.

    Args:
        name: of the command.
        begin: makes what is there before it.
        command: its arguments.
        again: the arguments that go on after a kill.
        result: what it made, None while there is nothing.
    """

    name: str
    begin: Callable[[], object]
    command: list[object]
    again: list[object]
    result: Callable[[], Any]


def scenarios(inputs: Inputs, folder: Path, *, engines: bool) -> list[Scenario]:
    """Return the commands, each working in `folder`."""
    out, text = folder / "out", ["--data", inputs.text]

    def copy(source: Path) -> None:
        shutil.copytree(source, out)

    def adapter_of_others() -> None:
        copy(inputs.adapter)
        (out / "archive.json").write_text("of the adapter before")
        (out / "mine").mkdir()
        for name, data in _MINE.items():
            (out / name).write_bytes(data)

    def timings() -> Any:
        path = folder / "cache" / "timings" / "cpu-ort.json"
        return [row["format"] for row in json.loads(path.read_text())["products"]] if path.is_file() else None

    def made() -> Any:
        return content(out) if out.is_dir() else None

    train, other = inputs.train(out), [*inputs.train(out), "--seed", 1, "--overwrite"]
    search = ["search", out, *text, "--evaluations", 5, "--blocks", 2, "--max-length", 32]
    build = ["build", inputs.adapter, "--target", "cpu", "-o", out, "--overwrite"]
    found = [
        Scenario("train", lambda: None, train, [*train, "--resume"], made),
        Scenario("train --overwrite", adapter_of_others, other, [*other, "--resume"], made),
        Scenario("search", partial(copy, inputs.adapter), search, search, made),
        Scenario("build", lambda: None, build, build, made),
        Scenario("build --overwrite", partial(copy, inputs.bundle), build, build, made),
        Scenario("calibrate", lambda: None, *(2 * [["devices", "calibrate", inputs.adapter]]), timings),
    ]
    if engines:
        rtx = ["build", inputs.adapter, "--target", "rtx-5090", "--target", "cpu", "-o", out, "--overwrite"]
        found.append(Scenario("build with an engine", lambda: None, rtx, rtx, made))
    return found


@dataclass
class Campaign:
    """What was killed, and what was wrong after it."""

    inputs: Inputs
    folder: Path
    engines: bool
    short: bool
    random: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.work = self.folder / "work"
        self.all = scenarios(self.inputs, self.work, engines=self.engines)
        if self.short:
            self.all = [scenario for scenario in self.all if scenario.name.endswith("--overwrite")]
        self.expected = {scenario.name: self._whole(scenario) for scenario in self.all}

    def _whole(self, scenario: Scenario) -> tuple[Any, Any, float]:
        """Return what is there before a command that nobody kills and after it, and the seconds it takes."""
        self._begin(scenario, warm=False)
        before, started = scenario.result(), time.monotonic()
        assert self._run(scenario.command) == 0, self._said()
        return before, scenario.result(), time.monotonic() - started

    def _begin(self, scenario: Scenario, *, warm: bool) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        (self.work / "tmp").mkdir(parents=True)
        if warm:
            shutil.copytree(self.folder / "cache", self.work / "cache")
        scenario.begin()

    def _run(self, arguments: list[object], arming: Callable[[], object] = lambda: None, **more: Any) -> int:
        def prepare() -> None:
            os.environ["COATRT_CACHE"], tempfile.tempdir = str(self.work / "cache"), str(self.work / "tmp")
            arming()

        return run_command(arguments, prepare, output=self.folder / "said", **more)

    def _said(self) -> str:
        return (self.folder / "said").read_text(errors="replace")[-400:]

    def at_random(self, scenario: Scenario) -> None:
        """Kill a command at a random moment, its next run perhaps too, and let the one after that end."""
        before, after, seconds = self.expected[scenario.name]
        self._begin(scenario, warm=self.random.random() < 0.5)
        arguments, swept = scenario.command, True
        for _ in range(self.random.choice((1, 1, 2))):
            number = self.random.choice(_SIGNALS)
            moment = self.random.uniform(0.0, 1.1 * seconds)

            def kill(child: int, number: int = number, moment: float = moment) -> None:
                time.sleep(moment)
                os.kill(child, number)

            code = self._run(arguments, started=kill)
            if code == 0:  # it had ended before
                arguments = scenario.again
                continue
            what = f"{scenario.name}, signal {number} after {moment:.3f} s"
            self.kills[f"{scenario.name}: {signal.Signals(number).name}"] += 1
            swept = swept and number != signal.SIGKILL  # what that leaves, the next run may not come to sweep
            if number != signal.SIGKILL:
                self._check_end(what, code, number, swept)
            self._check_between(what, scenario, before, after)
            arguments = scenario.again
        self._check_end_of_all(f"{scenario.name} at random", scenario, after)

    def at_each_rename(self, scenario: Scenario, *, every: int = 1) -> None:
        """Kill a command at its first rename, its second and so on, each time from the beginning."""
        before, after, _ = self.expected[scenario.name]
        step = self.random.randrange(every)
        while True:
            self._begin(scenario, warm=False)
            code = self._run(scenario.command, lambda step=step: arm(step, _RENAMES, locks=False))
            if code == 0:
                return
            what = f"{scenario.name}, rename {step}"
            if code != -signal.SIGKILL:
                self.failures.append(f"{what}: exit code {code}: {self._said()}")
                return
            self.kills[f"{scenario.name}: at a rename"] += 1
            self._check_between(what, scenario, before, after)
            self._check_end_of_all(what, scenario, after)
            step += every

    def _check_end(self, what: str, code: int, number: int, swept: bool) -> None:
        """Check what SIGTERM and SIGINT leave: the exit code, at most a line, nothing hidden."""
        if code not in (128 + number, -number):  # the second before the command has begun
            self.failures.append(f"{what}: exit code {code}: {self._said()}")
        if "Traceback" in self._said():
            self.failures.append(f"{what}: {self._said()}")
        if swept and code == 128 + number and (left := leftovers(self.work)):
            self.failures.append(f"{what}: left {left}")

    def _check_between(self, what: str, scenario: Scenario, before: Any, after: Any) -> None:
        """Check that what was there before is there, whole, or what comes after is; and that no builder lives on."""
        if scenario.name in ("train --overwrite", "build --overwrite"):
            found = scenario.result()
            seen = {name: value for name, value in found.items() if not name.startswith(("training", "."))}
            if seen not in (before, after):
                self.failures.append(f"{what}: neither old nor new, but {sorted(seen)}")
        deadline = time.monotonic() + 5
        while _builders(self.work) and time.monotonic() < deadline:
            time.sleep(0.05)
        if _builders(self.work):
            self.failures.append(f"{what}: a builder lives on")

    def _check_end_of_all(self, what: str, scenario: Scenario, after: Any) -> None:
        """Let the command end, and check result and leftovers."""
        code = self._run(scenario.again)
        found = scenario.result()
        if code or found != after:
            which = (
                sorted(k for k in {*found, *after} if found.get(k) != after.get(k)) if isinstance(found, dict) else ""
            )
            self.failures.append(f"{what}, then again: exit code {code}, other {which}: {self._said()}")
        if left := leftovers(self.work):
            self.failures.append(f"{what}, then again: left {left}")


def _builders(folder: Path) -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if "coatrt.engines.builders.worker" in line and str(folder) in line:
            found.append(process.pid)
    return found


def campaign(folder: Path, kills: int, *, engines: bool, seed: int = 0, short: bool = False) -> dict[str, Any]:
    """Run the campaign and return its figures.

    Args:
        folder: to work in.
        kills: at random moments.
        engines: build engines too.
        seed: of the moments.
        short: two commands only, and of their renames one in nine.
    """
    started = time.monotonic()
    os.environ["COATRT_CACHE"] = str(folder / "cache")
    found = Campaign(Inputs(folder / "inputs"), folder, engines, short, random.Random(seed))
    for scenario in _turns(found.all, kills, found.kills):
        found.at_random(scenario)
    for scenario in found.all:
        if scenario.name != "build with an engine":
            found.at_each_rename(scenario, every=9 if short else 1)
    return {
        "kills": sum(found.kills.values()),
        "by": dict(sorted(found.kills.items())),
        "failures": found.failures,
        "seconds": round(time.monotonic() - started),
    }


def _turns(all_of_them: list[Scenario], kills: int, done: Counter[str]) -> Iterator[Scenario]:
    while sum(done.values()) < kills:
        for scenario in all_of_them:
            if sum(done.values()) < kills:
                yield scenario


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="at random moments; those at renames come on top")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="two commands, and of their renames one in nine")
    parser.add_argument("-o", "--output", type=Path, help="JSON file of the figures")
    options = parser.parse_args()
    try:
        import tensorrt_rtx  # noqa: F401

        engines = True
    except ImportError:
        engines = False
    import_everything()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        figures = campaign(Path(folder), options.kills, engines=engines, seed=options.seed, short=options.short)
    text = json.dumps({**figures, "engines": engines, "seed": options.seed}, indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n")
    print(text)
    sys.exit(bool(figures["failures"]))


if __name__ == "__main__":
    main()
