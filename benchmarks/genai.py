"""Real bundles in onnxruntime-genai: text, logits, lm-eval's score, a package, what optional LoRA inputs cost.

python benchmarks/genai.py BUNDLE… --lm-eval PYTHON

BUNDLE: what make demo leaves in out/demo, with the quality that it measured, as coatrt verify --data does, beside it.
PYTHON: an interpreter with lm-eval (see benchmarks/genai_lm_eval.py).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as og
from common import RESULTS, save_result

import coatrt

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "tests")]
from demo import passages  # noqa: E402

from support.ort_package import selected_variant  # noqa: E402

PROMPTS = (
    "The state of our finances",
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at",
    "Fellow citizens of the Senate and of the House of Representatives,",
    "A list of the planets: Mercury, Venus,",
    "In 1865, the war",
)
TOKENS = 64
SECTIONS = ("texts", "lm_eval", "package", "optional_inputs")


def generated(model: Any, ids: Sequence[int], adapters: Any, adapter: str) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Return the logits of a prompt, [S or 1, V], and the continuation, with one adapter or none."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + TOKENS)
    generator = og.Generator(model, params)
    if adapter:
        generator.set_active_adapter(adapters, adapter)
    generator.append_tokens(list(ids))
    logits = generator.get_output("logits")[0].copy()
    while not generator.is_done():
        generator.generate_next_token()
    return logits, [int(token) for token in generator.get_sequence(0)[len(ids) :]]


def texts(bundle: coatrt.Bundle, directory: Path) -> dict[str, Any]:
    """Return how many prompts have the text of coatrt's decoder, and the largest difference of a logit."""
    model = og.Model(str(directory))
    adapters, tokenizer = og.Adapters(model), og.Tokenizer(model)
    adapters.load(str(directory / "adapters" / "none.onnx_adapter"), "none")
    decoder, own = coatrt.load_decoder(bundle, context=512, threads=1), bundle.tokenizer()
    lora = coatrt.load_lora(bundle.path("lora.safetensors"), bundle.contract)
    stops, found = bundle.manifest["model"]["stop_tokens"], {}
    prompts = [coatrt.encode_prompt(own, text) for text in PROMPTS]
    read = [[int(token) for token in tokenizer.encode(text)] for text in PROMPTS]
    for name, adapter in (("lora", ""), ("no_lora", "none")):  # the LoRA applies without an adapter
        decoder.set_lora(None if adapter == "none" else lora)
        equal, difference = 0, 0.0
        for ids in prompts:
            logits, tokens = generated(model, ids, adapters, adapter)
            difference = max(difference, float(np.abs(logits[-1] - decoder.prefill([ids])[0]).max()))
            (expected,) = coatrt.generate(decoder, [ids], max_tokens=TOKENS, stop=stops)
            kept = tokens[:-1] if tokens and tokens[-1] in stops else tokens
            equal += kept == list(expected.tokens)
        found[name] = {"equal_texts": equal, "largest_difference": difference}
    return {"prompts": len(PROMPTS), "tokens": TOKENS, "equal_prompts": sum(map(list.__eq__, read, prompts)), **found}


def score(directory: Path, rows: list[list[int]], python: str) -> dict[str, Any]:
    """Return what lm-eval's backend makes of rows of tokens."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(rows, file)
        file.flush()
        command = [python, str(Path(__file__).with_name("genai_lm_eval.py")), str(directory), file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"lm-eval failed: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


LOAD = """
import json, sys, time
from pathlib import Path
import psutil
from coatrt.engines.runtime.ort import session
started = time.perf_counter()
opened = session(Path(sys.argv[1]), 1, 4)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "unshared_bytes": psutil.Process().memory_full_info().uss}))
"""


def loading(graph: Path) -> dict[str, float]:
    """Return the least seconds and bytes of three loads of a graph."""
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", LOAD, str(graph)], capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    return {name: min(run[name] for run in runs) for name in runs[0]}


def optional_inputs(bundle: coatrt.Bundle, work: Path) -> dict[str, Any]:
    """Return what LoRA inputs with default values cost, zeros and the LoRA itself, beside inputs that are required."""
    found: dict[str, Any] = {"required": loading(bundle.decoder("cpu")[0])}
    for name, lora in (("zeros", "off"), ("LoRA", "on")):
        options = coatrt.GenaiOptions(provider="cpu", lora=lora)  # type: ignore[arg-type]
        directory = coatrt.export_genai(bundle, work / name, options).directory
        found[name] = {**loading(directory / "model.onnx"), "file_bytes": (directory / "lora.bin").stat().st_size}
    return found


def one_thread(directory: Path) -> Path:
    """Let an export run in one thread: measured are numbers, not speed, and other programs run beside it."""
    path = directory / "genai_config.json"
    settings = json.loads(path.read_text())
    settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
    path.write_text(json.dumps(settings))
    return directory


def measure_texts(bundle: coatrt.Bundle, work: Path) -> dict[str, Any]:
    """Return how an export compares with coatrt's own decoder."""
    export = coatrt.export_genai(bundle, work / "usual", coatrt.GenaiOptions(provider="cpu"))
    return {**texts(bundle, one_thread(export.directory)), "bytes": export.nbytes}


def measure_score(bundle: coatrt.Bundle, work: Path, python: str) -> dict[str, Any]:
    """Return the loss of the demo's passages by lm-eval, and the one measured in torch with the bundle's weights."""
    every = coatrt.GenaiOptions(provider="cpu", all_logits=True, accuracy_level=0)
    directory = one_thread(coatrt.export_genai(bundle, work / "every", every).directory)
    data = passages(coatrt.Checkpoint.open(bundle.manifest["model"]["source"]))
    rows = [[int(token) for token in row] for row in data.held_out.tokens]
    beside = bundle.directory.with_name(f"{bundle.directory.name}.quality.json")
    return {**score(directory, rows, python), "verify": json.loads(beside.read_text())["quality"]["adapted"]["loss"]}


def package(bundles: Sequence[coatrt.Bundle], work: Path) -> dict[str, Any]:
    """Return what a package of all bundles holds, which variant ONNX Runtime takes, and what each writes on the CPU."""
    fleet = coatrt.package_genai(bundles, work / "fleet.ortpackage", coatrt.GenaiOptions(provider="cpu"))
    written = {}
    for name, folder in fleet.variants.items():
        model = og.Model(str(one_thread(fleet.directory / folder)))
        tokenizer, generator = og.Tokenizer(model), og.Generator(model, og.GeneratorParams(model))
        generator.append_tokens(tokenizer.encode(PROMPTS[0]))
        for _ in range(8):
            generator.generate_next_token()
        written[name] = tokenizer.decode(generator.get_sequence(0))
    chosen, _ = selected_variant(fleet.directory)
    picked = {name: coatrt.pick_variant(fleet.directory, name).name for name in fleet.variants}
    return {"variants": list(fleet.variants), "onnx_runtime_takes": chosen, "picked": picked, "texts": written}


def main() -> None:
    """Measure and write; a result is saved as soon as it is there, and the others are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"Of {', '.join(SECTIONS)}.")
    parser.add_argument("--lm-eval", metavar="PYTHON", default=sys.executable)
    arguments = parser.parse_args()
    bundles = [coatrt.Bundle.open(path) for path in arguments.bundles]
    path = RESULTS / "genai.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    result |= {"onnxruntime": ort.__version__, "onnxruntime_genai": og.__version__}
    with tempfile.TemporaryDirectory(prefix="genai-") as folder:
        for section in arguments.sections.split(","):
            for bundle in bundles if section in ("texts", "lm_eval") else ():
                work = Path(folder) / f"{section}-{bundle.directory.name}"
                measure = measure_texts if section == "texts" else partial(measure_score, python=arguments.lm_eval)
                result.setdefault(section, {})[bundle.directory.name] = measure(bundle, work)
                save(result)
            if section == "package":
                result[section] = package(bundles, Path(folder))
            if section == "optional_inputs":
                result[section] = optional_inputs(bundles[0], Path(folder))
            save(result)


def save(result: dict[str, Any]) -> None:
    """Write what has been measured so far."""
    save_result("genai", "python benchmarks/genai.py out/demo/rtx-* --lm-eval PYTHON", result)


if __name__ == "__main__":
    main()
