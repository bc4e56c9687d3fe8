"""The C++ library against Python on one adapter: tokens, logits, LoRA, time per token, change of configuration.

python benchmarks/cpp_runtime.py ADAPTER [--rounds 12]

The package is installed with pip into a fresh directory and the programs are built against it, as README says.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import save_result
from safetensors.numpy import load_file

from coatrt.adapter.adapter import Adapter
from coatrt.bundle import Bundle
from coatrt.configs.config import ConfigPatterns
from coatrt.devices.profiles import device_profile
from coatrt.engines.bundles.execute import execute
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.prepare import prepare
from coatrt.engines.bundles.targets import Target
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.ort import OrtDecoder

ROOT = Path(__file__).resolve().parents[1]
TEXT = "Once upon a time there was a king who had three daughters, and"
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "int8": {"default": "int8"},
    "int4": {"default": "int4-g64"},
    "nf3 mixed": {
        "patterns": {"*.v_proj": "int8", "*.down_proj": "int8"},
        "matrices": {"model.embed_tokens": "int8"},
        "default": "nf3-g64",
    },
}
CONTEXT = 256


def call(*command: object, **environment: str) -> str:
    """Run a command and return its output."""
    process = subprocess.run(
        list(map(str, command)), env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if process.returncode:
        sys.exit(f"{command[0]} failed: {(process.stdout + process.stderr)[-2000:]}")
    return process.stdout


def build(work: Path, *programs: str) -> dict[str, Path]:
    """Install the package into `work` with pip and build programs (folders of this repository) against it."""
    call(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--target",
        work / "installed",
        ROOT,
    )
    headers = ROOT / "build" / "deps"
    call(sys.executable, ROOT / "examples" / "fetch_headers.py", headers)
    cmake_directory = call(sys.executable, "-m", "coatrt", "cmake-dir", PYTHONPATH=str(work / "installed")).strip()
    paths = {}
    for program in programs:
        target = work / Path(program).name
        call(
            "cmake",
            "-S",
            ROOT / program,
            "-B",
            target,
            f"-Dcoatrt_DIR={cmake_directory}",
            f"-DCMAKE_PREFIX_PATH={headers}",
        )
        call("cmake", "--build", target, "--parallel", os.cpu_count() or 1)
        name = "bench" if program == "benchmarks/cpp" else Path(program).name
        paths[name] = target / name
    return paths


class Process:
    """The bench program, driven line by line."""

    def __init__(self, program: Path, bundle: Path, threads: int) -> None:
        library = call(sys.executable, "-m", "coatrt", "cmake-dir", "--onnxruntime").strip()
        self.process = subprocess.Popen(
            [str(program), str(bundle), str(threads), str(CONTEXT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "COATRT_ONNXRUNTIME": library},
        )
        self.load_s = self.answer()["load_s"]

    def answer(self) -> Any:
        """Return the next answer."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, **request: Any) -> Any:
        """Return the answer to a request."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()


def decode(decoder: OrtDecoder, prompt: list[int], steps: int) -> tuple[list[int], list[float]]:
    """Return greedy tokens and the seconds of each step, including the choice of the token."""
    logits, tokens, seconds = decoder.prefill([prompt]), [], []
    for _ in range(steps):
        start = time.perf_counter()
        tokens.append(int(logits[0].argmax()))
        logits = decoder.decode(tokens[-1:])
        seconds.append(time.perf_counter() - start)
    return tokens, seconds


def measure(bundle: Bundle, process: Process, decoder: OrtDecoder, prompt: list[int], rounds: int) -> dict[str, Any]:
    """Return seconds per token of both, alternating within every round."""
    rows: dict[str, list[float]] = {"python": [], "cpp": []}
    for turn in range(rounds + 1):
        for name in ("python", "cpp") if turn % 2 else ("cpp", "python"):
            if name == "cpp":
                seconds = process.ask(prompt=prompt, steps=24)["seconds"]
            else:
                seconds = decode(decoder, prompt, 24)[1]
            if turn:
                rows[name].append(float(np.median(seconds)))
    ratios = np.array(rows["cpp"]) / np.array(rows["python"])
    return {
        "rounds": rounds,
        "python_ms": 1e3 * float(np.median(rows["python"])),
        "cpp_ms": 1e3 * float(np.median(rows["cpp"])),
        "ratio": float(np.median(ratios)),
        "ratio_quartiles": [float(np.percentile(ratios, q)) for q in (25, 75)],
    }


def main() -> None:
    """Build three bundles and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--bundles", type=Path, help="Directory for the bundles; default: a temporary directory.")
    arguments = parser.parse_args()
    adapter = Adapter.from_pretrained(arguments.adapter)
    checkpoint, rows, threads = adapter.checkpoint(), [], 1
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        programs = build(work, "examples/minimal", "benchmarks/cpp")
        for kind, value in CONFIGURATIONS.items():
            directory = (arguments.bundles or work) / kind.replace(" ", "-")
            if not directory.exists():
                config = ConfigPatterns.from_json(value).resolve(adapter.description.space.model)
                options = BundleOptions(context=CONTEXT, engine=False)
                target = Target(device_profile("rtx-4090"), config, directory)
                execute(prepare(adapter.description, [target], options), adapter, checkpoint)
            bundle = Bundle.open(directory)
            rows.append({"bundle": kind, **compare(bundle, programs, work, threads, arguments.rounds)})
    command = "python benchmarks/cpp_runtime.py ADAPTER"
    save_result("cpp_runtime", command, {"context": CONTEXT, "threads": threads, "rows": rows})


def compare(bundle: Bundle, programs: dict[str, Path], work: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Compare C++ and Python on one bundle."""
    from transformers import AutoTokenizer

    decoder = load_decoder(bundle, RuntimeOptions(context=CONTEXT, threads=threads))
    assert isinstance(decoder, OrtDecoder)
    decoder.set_lora(load_lora(bundle.path("lora.safetensors"), bundle.contract))
    tokenizer = AutoTokenizer.from_pretrained(str(bundle.folder("tokenizer")))
    prompt = tokenizer(TEXT)["input_ids"]
    library = call(sys.executable, "-m", "coatrt", "cmake-dir", "--onnxruntime").strip()
    written = call(programs["minimal"], bundle.directory, TEXT, COATRT_ONNXRUNTIME=library)
    process = Process(programs["bench"], bundle.directory, threads)
    answer = process.ask(prompt=prompt, steps=64, logits=True)
    tokens, _ = decode(decoder, prompt, 64)
    difference = float(np.abs(np.array(answer["logits"], np.float32) - decoder.prefill([prompt])[0]).max())
    speed = measure(bundle, process, decoder, prompt, rounds)

    emitter, equal, tensors = Emitter.of(bundle, threads), 0, 0
    for value in CONFIGURATIONS.values():
        times = process.ask(emit=value, to=str(work / "lora.safetensors"))
        expected = emitter.emit(ConfigPatterns.from_json(value).resolve(bundle.model_matrices))
        lora = load_file(work / "lora.safetensors")
        tensors += len(expected)
        equal += sum(lora[name].tobytes() == tensor.tobytes() for name, tensor in expected.items())
    load = process.ask(load=list(CONFIGURATIONS.values()), prompt=prompt, tokens=16, workers=4, turns=6)
    assert load["differ"], "configurations must give different tokens, or the comparison shows nothing"
    return {
        "text_equals_coatrt_run": written == call(sys.executable, "-m", "coatrt", "run", bundle.directory, "-p", TEXT),
        "tokens_equal": answer["tokens"] == tokens,
        "logits_difference": difference,
        "load_s": process.load_s,
        "decode": speed,
        "lora_tensors": tensors,
        "lora_equal": equal,
        "emit_ms": 1e3 * times["emit_s"],
        "bind_ms": 1e3 * times["swap_s"],
        "under_load": {
            "workers": 4,
            "generations": load["generations"],
            "wrong": load["wrong"],
            "swap_p50_ms": 1e3 * float(np.median(load["swap_s"])),
            "swap_p99_ms": 1e3 * float(np.percentile(load["swap_s"], 99)),
        },
    }


if __name__ == "__main__":
    main()
