"""Inputs of every kind, mutated: whatever coatrt is given, it works, or says in one line why not.

    python tests/campaigns/mutations.py --mutations 10000 --commands 300 -o mutations.json

Counts what happened by kind of input, and names every fault: another exception than CoatError, more than one line, or
more than 30 seconds. A fault is seen again with --seed N --only KIND --number I.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

from campaigns import readers  # noqa: E402
from campaigns.inputs import METHODS, SEALED, make_inputs, reseal, seal_again  # noqa: E402
from campaigns.mutate import mutate  # noqa: E402

__all__ = ["COMMANDS", "KINDS", "Campaign", "run_command"]

_SECONDS = 30


class Hang(BaseException):
    """More than 30 seconds."""


KINDS: dict[str, tuple[str, tuple[tuple[Callable[[Path], None], tuple[str, ...]], ...]]] = {
    # file that is mutated: readers of the path that follows, each with the command that reads it
    "model/config.json": ("model", ((readers.read_model, ("train",)),)),
    "model/generation_config.json": ("model", ((readers.read_model, ("export",)),)),
    "model/model.safetensors": ("model", ((readers.read_model, ("train",)),)),
    "model/tokenizer.json": ("model", ((readers.read_tokenizer, ("train",)),)),
    "model/tokenizer_config.json": ("model", ((readers.read_tokenizer, ("train",)),)),
    "model.gguf": ("model.gguf", ((readers.read_model, ("train-gguf",)),)),
    **{
        f"{method}/{file}": (method, ((readers.read_model, (f"train-{method}",)),))
        for method in METHODS
        for file in ("config.json", "model.safetensors")
    },
    "chat.jsonl": ("chat.jsonl", ((readers.read_data("chat"), ("chat",)),)),
    "choice.jsonl": ("choice.jsonl", ((readers.read_data("choice"), ("choice",)),)),
    "data.txt": ("data.txt", ((readers.read_data("text"), ("train",)),)),
    "configuration.json": ("configuration.json", ((readers.read_choice, ("adapt",)),)),
    "plan.json": ("plan.json", ((readers.read_choice, ("build",)),)),
    "adapter/archive.json": ("adapter", ((readers.read_adapter, ("plan",)), (readers.read_report, ("report",)))),
    "adapter/adapter.json": ("adapter", ((readers.read_adapter, ("plan",)), (readers.read_report, ("report",)))),
    "adapter/metrics.json": ("adapter", ((readers.read_adapter, ("search",)), (readers.read_report, ("report",)))),
    "adapter/sensitivity.json": ("adapter", ((readers.read_adapter, ("plan",)),)),
    "adapter/adapter.safetensors": ("adapter", ((readers.read_adapter, ("export",)),)),
    "adapter/calibration.safetensors": ("adapter", ((readers.read_adapter, ("export",)),)),
    "adapter/scales.safetensors": ("adapter", ((readers.read_adapter, ("export",)),)),
    "bundle/manifest.json": ("bundle", ((readers.read_bundle, ("run",)), (readers.read_report, ("report-bundle",)))),
    "bundle/lora_io.json": ("bundle", ((readers.read_bundle, ("run",)),)),
    "bundle/hypernet.json": ("bundle", ((readers.read_bundle, ("adapt",)),)),
    "bundle/configuration.json": (
        "bundle", ((readers.read_bundle, ("adapt",)), (readers.read_report, ("report-bundle",)))
    ),
    "bundle/plan.json": ("bundle", ((readers.read_report, ("report-bundle",)),)),
    "bundle/tokenizer/tokenizer_config.json": ("bundle/tokenizer", ((readers.read_tokenizer, ("run",)),)),
    "lora.safetensors": ("lora.safetensors", ((readers.read_lora, ("run",)),)),
    "cpu.json": ("cpu.json", ((readers.read_timings, ("plan-cpu",)),)),
    "state/run.json": ("state", ((readers.read_state, ("train",)),)),
}  # fmt: skip

_TRAIN = (
    "--steps 1 --batch 1 --max-length 16 --calibration 1 --evaluation 1 --budgets 9 --formats int8,fp16 "
    "--quantizer absmax"
)
COMMANDS = {
    "train": f"train {{here}}/model --data {{here}}/data.txt -o {{here}}/out --overwrite {_TRAIN}",
    "train-gguf": f"train {{here}}/model.gguf --data {{here}}/data.txt -o {{here}}/out --overwrite {_TRAIN}",
    "chat": f"train {{here}}/model --task chat --data {{here}}/chat.jsonl -o {{here}}/out --overwrite {_TRAIN}",
    "choice": f"train {{here}}/model --task choice --data {{here}}/choice.jsonl -o {{here}}/out --overwrite {_TRAIN}",
    "export": "export {here}/adapter --config {here}/configuration.json --model {here}/model -o {here}/out --overwrite",
    "adapt": "adapt {here}/bundle --config {here}/configuration.json -o {here}/out.safetensors",
    "build": "build {here}/adapter --config {here}/plan.json --target t4 -o {here}/out --dry-run",
    "plan": "plan {here}/adapter --target t4 --target cpu --json",
    "plan-cpu": "plan {here}/adapter --target cpu --objective latency",
    "search": "search {here}/adapter --data {here}/data.txt --evaluations 4 --blocks 1",
    "report": "report {here}/adapter --target t4 -o {here}/out.html",
    "report-bundle": "report {here}/bundle -o {here}/out.html",
    "run": "run {here}/bundle -p x --chat --max-tokens 2 --lora {here}/lora.safetensors --context 16 --threads 1",
}
COMMANDS |= {f"train-{m}": COMMANDS["train"].replace("{here}/model ", f"{{here}}/{m} ") for m in METHODS}
COMMANDS |= {name: COMMANDS[name].replace("--max-length 16", "--max-length 400") for name in ("chat", "choice")}


class Campaign:
    """A campaign on one set of inputs.

    Args:
        here: directory to work in.
        seed: of all mutations.
    """

    def __init__(self, here: Path, seed: int = 0) -> None:
        self.whole, self.work, self.seed = here / "whole", here / "work", seed
        self.outcomes: dict[str, Counter[str]] = {}
        self.faults: dict[str, dict[str, Any]] = {}
        self.whole.mkdir(parents=True)
        make_inputs(self.whole)
        self.kinds = [kind for kind in KINDS if (self.whole / kind).exists()]
        shutil.copytree(self.whole, self.work)

    def mutate(self, kind: str, number: int) -> None:
        """Leave the inputs in the working directory with one of them mutated."""
        rng = random.Random(f"{self.seed} {kind} {number}")
        data = mutate(rng, (self.whole / kind).read_bytes(), Path(kind).suffix)
        (self.work / kind).write_bytes(data)
        parts = Path(kind).parts
        if parts[0] in ("adapter", "bundle") and rng.random() < 0.9:
            reseal(self.work / parts[0], str(Path(*parts[1:])))
        elif kind in SEALED and rng.random() < 0.9:
            seal_again(self.work / kind)

    def restore(self, kind: str) -> None:
        """Undo `mutate`."""
        shutil.copy(self.whole / kind, self.work / kind)
        for name in ("adapter/adapter.json", "adapter/archive.json", "bundle/manifest.json"):
            if kind.startswith(name.partition("/")[0]):
                shutil.copy(self.whole / name, self.work / name)

    def read(self, kind: str, number: int) -> None:
        """Let the readers of a kind read a mutation of it."""
        self.mutate(kind, number)
        path, readers = KINDS[kind]
        for reader, _ in readers:
            self._outcome(kind, number, lambda reader=reader: reader(self.work / path))
        self.restore(kind)

    def command(self, kind: str, number: int) -> None:
        """Let a command, as a user types it, read a mutation of a kind."""
        self.mutate(kind, number)
        names = [name for _, names in KINDS[kind][1] for name in names]
        words = COMMANDS[names[number % len(names)]].format(here=self.work).split()
        self._outcome(f"coatrt {words[0]}: {kind}", number, lambda: run_command(words))
        self.restore(kind)

    def _outcome(self, kind: str, number: int, call: Callable[[], object]) -> None:
        from coatrt.errors import CoatError

        outcome, fault = "works", None
        try:
            with _limit():
                call()
        except CoatError as error:
            outcome = "refused"
            if len(str(error).splitlines()) != 1 or len(str(error)) > 3000:
                fault = f"{len(str(error).splitlines())} lines, {len(str(error))} characters: {str(error)[:300]}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "/campaigns/" not in f.filename]
            own = [f for f in frames if str(ROOT) in f.filename and ".venv" not in f.filename]
            where = f"{own[-1].filename.removeprefix(str(ROOT) + '/')}:{own[-1].name}" if own else ""
            fault = f"{type(error).__name__} in {where}: {str(error)[:300]}"
        if fault is not None:
            outcome = "fault"
            name = f"{kind}: {fault.partition(': ')[0]}"
            if name not in self.faults:
                print(f"{name} (--number {number})", file=sys.stderr, flush=True)
            self.faults.setdefault(name, {"first": number, "said": fault, "times": 0})["times"] += 1
        self.outcomes.setdefault(kind, Counter())[outcome] += 1

    def result(self) -> dict[str, Any]:
        """Return what happened."""
        total = sum(self.outcomes.values(), Counter())
        return {"seed": self.seed, "outcomes": total, "by_kind": self.outcomes, "faults": self.faults}


def run_command(words: list[str]) -> None:
    """Run a command to its exit code and what it says on standard error."""
    from coatrt.cli.main import main

    before, sys.argv = sys.argv, ["coatrt", *words]
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):
            main()
    except SystemExit as ended:
        said.seek(0)
        text = said.read()
        lines = [line for line in text.splitlines() if line.startswith("coatrt: ")]
        if ended.code not in (0, 2) or "Traceback" in text or (ended.code == 2 and not lines and "Error:" not in text):
            raise AssertionError(f"exit code {ended.code}: {text[-400:]}") from None
        if ended.code == 2:
            from coatrt.errors import CoatError

            raise CoatError(lines[-1] if lines else "an option") from None
    finally:
        sys.argv = before


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"more than {_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    faulthandler.dump_traceback_later(10 * _SECONDS, exit=True)  # where Python gets no word in
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def main() -> None:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=10000, help="read in process")
    parser.add_argument("--commands", type=int, default=0, help="read through commands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="kinds of input")
    parser.add_argument("--number", type=int, help="this mutation alone")
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="coatrt-mutations-") as here, contextlib.suppress(KeyboardInterrupt):
        os.environ["COATRT_CACHE"] = f"{here}/cache"
        campaign = Campaign(Path(here) / "inputs", asked.seed)
        kinds = [kind for kind in campaign.kinds if asked.only is None or kind in asked.only]
        numbers = range(asked.mutations) if asked.number is None else [asked.number * len(kinds)]
        for i in numbers:
            campaign.read(kinds[i % len(kinds)], i // len(kinds))
            if i % 500 == 499:
                print(i + 1, round(time.monotonic() - started), "s", len(campaign.faults), "faults", file=sys.stderr)
        for i in range(asked.commands):
            campaign.command(kinds[i % len(kinds)], i // len(kinds))
    result = {**campaign.result(), "seconds": round(time.monotonic() - started)}  # of an interrupted campaign too
    text = json.dumps(result, indent=1)
    if asked.output is not None:
        asked.output.write_text(text + "\n")
    print(text)
    sys.exit(bool(result["faults"]))


if __name__ == "__main__":
    main()
