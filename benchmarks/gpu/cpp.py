"""The C++ library's backend "cuda": compiled here, its tokens and logits against Python's, its times, its sessions.

    python examples/fetch_headers.py build/deps          # nlohmann-json's and ONNX Runtime's headers
    python benchmarks/gpu/cpp.py --out rows [--headers build/deps/include] [--bundle BUNDLE]

It needs a C++ compiler, the headers, and the C library of onnxruntime-gpu (`onnxruntime/capi/libonnxruntime.so.*`);
if one is missing, its only row says which. Without --bundle a tiny model is trained and built, which needs the
tests' folder. `--dry-run` computes on the CPU.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from backend import percentiles, seconds_of
from rows import Rows, arguments, run

ROOT = Path(__file__).resolve().parents[2]
CONTEXT, STEPS = 256, 100
PROMPT = [10, 200, 30, 44, 5, 66, 77]
LOAD = [{"default": "int8"}, {"default": "int4-g32"}, {"default": "nf3-g32"}]


def tiny_bundle(scratch: Path) -> Path:
    """Train a random model of two layers for a few steps and build it without an engine."""
    sys.path.append(str(ROOT / "tests"))
    from coatrt.adapter.adapter import Adapter
    from coatrt.engines.bundles.options import BundleOptions
    from coatrt.training.run import train
    from support.bundles import make_bundle
    from support.tiny import save_tiny_llama, text_data, tiny_options

    model = save_tiny_llama(scratch / "model")
    train(model, text_data(model), scratch / "adapter", tiny_options(steps=20))
    adapter = Adapter.from_pretrained(scratch / "adapter")
    config = adapter.description.space.uniform("int4-g32")
    options = BundleOptions(context=CONTEXT, engine=False)
    return make_bundle(adapter, config, "rtx-4090", scratch / "bundle", options).directory


def library() -> Path:
    """Return ONNX Runtime's C library, which Python's module does not use itself.

    Raises:
        FileNotFoundError: the package was installed without it.
    """
    folder = Path(onnxruntime.__file__).parent / "capi"
    for path in sorted(folder.glob("libonnxruntime.so.*")):
        return path
    raise FileNotFoundError(f"no libonnxruntime.so in {folder}: install onnxruntime-gpu with its C library")


def program(headers: Path) -> Path:
    """Return benchmarks/cpp/bench.cpp, compiled with the library unless it is already.

    Raises:
        FileNotFoundError: no compiler or no headers.
        RuntimeError: the compiler fails.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler on this machine")
    for name in ("nlohmann/json.hpp", "onnxruntime/onnxruntime_c_api.h"):
        if not (headers / name).is_file():
            raise FileNotFoundError(f"no {name} in {headers}: run examples/fetch_headers.py build/deps")
    cpp = ROOT / "engines" / "cpp"
    folders = (cpp / "src", *(cpp / "src" / name for name in ("cuda", "ort", "portable", "tokenizer")))
    sources = [path for folder in folders for path in sorted(folder.glob("*.cpp"))]
    sources.append(ROOT / "benchmarks" / "cpp" / "bench.cpp")
    every = sorted(path for path in cpp.rglob("*") if path.suffix in (".cpp", ".hpp", ".inc"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in [*every, sources[-1]])).hexdigest()[:12]
    made = ROOT / "build" / "gpu" / f"cpp-{digest}"
    if made.exists():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O2", "-pthread", f"-I{cpp / 'include'}", f"-I{cpp / 'src'}"]
    flags += ["-isystem", str(headers), "-isystem", str(headers / "onnxruntime")]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(Path(scratch) / f"{number}.o") for number in range(len(sources))]
        compiled = [
            pool.submit(_call, compiler, *flags, "-c", str(source), "-o", target)
            for source, target in zip(sources, objects, strict=True)
        ]
        for one in compiled:
            one.result()
        linked = Path(scratch) / "bench"
        _call(compiler, "-pthread", *objects, "-ldl", "-o", str(linked))
        shutil.copy(linked, made)
    return made


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[:400])


def _cuda_folders() -> list[Path]:
    """Return pip's directories of CUDA's libraries; onnxruntime may be in another place."""
    found: list[Path] = []
    for package, below in (("nvidia", "*/lib"), ("torch", "lib")):
        spec = importlib.util.find_spec(package)
        for root in spec.submodule_search_locations or () if spec is not None else ():
            found += sorted(Path(root).glob(below))
    return found


class Bench:
    """The program with a loaded bundle, driven line by line.

    Args:
        command: the program and its arguments.

    Raises:
        RuntimeError: it ends with an error, which is quoted.
    """

    def __init__(self, *command: str) -> None:
        path = os.pathsep.join([*map(str, _cuda_folders()), os.environ.get("LD_LIBRARY_PATH", "")])
        environment = {**os.environ, "COATRT_ONNXRUNTIME": str(library()), "LD_LIBRARY_PATH": path.strip(os.pathsep)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
        self.load_s = self._answer()["load_s"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._process.stderr.read()[-400:])
        return dict(json.loads(line))

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def compare(bench: Bench, bundle: Any, dry: bool) -> dict[str, Any]:
    """Return the differences of the C++ library's numbers from Python's, and the times of both, in milliseconds."""
    from coatrt.configs.config import ConfigPatterns
    from coatrt.engines.runtime.cuda import CudaDecoder
    from coatrt.engines.runtime.emitter import Emitter
    from coatrt.engines.runtime.lora_file import load_lora
    from coatrt.engines.runtime.options import RuntimeOptions

    options = RuntimeOptions(backend="cuda", context=CONTEXT)
    decoder = CudaDecoder.of(bundle, options, provider="cpu" if dry else "cuda")
    steps = 8 if dry else STEPS
    found: dict[str, Any] = {}
    for name in ("own", "int8"):
        if name == "own":
            lora = load_lora(bundle.path("lora.safetensors"), bundle.contract)
        else:
            patterns = ConfigPatterns.from_json({"default": name})
            lora = Emitter.of(bundle).emit(patterns.resolve(bundle.model_matrices))
            found |= {key: round(value, 4) for key, value in bench.ask(emit={"default": name}).items()}
        decoder.set_lora(lora)
        answer = bench.ask(prompt=PROMPT, steps=steps, logits=True)
        logits = decoder.prefill([PROMPT])
        differ = np.abs(np.array(answer["logits"], np.float32) - logits[0]).max() / np.abs(logits).max()
        tokens = []
        for _ in range(steps):
            tokens.append(int(logits[0].argmax()))
            logits = decoder.decode([tokens[-1]])
        found |= {f"{name}_tokens_equal": tokens == answer["tokens"], f"{name}_logits_differ": float(differ)}
    # The first step captures.
    found["decode_ms"] = percentiles(bench.ask(prompt=PROMPT, steps=steps)["seconds"][1:])
    found["python_decode_ms"] = percentiles(seconds_of(lambda: decoder.decode([PROMPT[0]]), steps // 2))
    return found


def main() -> None:
    """Measure."""
    rows, given = arguments(__doc__.splitlines()[0], headers=str(ROOT / "build" / "deps" / "include"), bundle="")
    from coatrt.bundle import Bundle

    made: dict[str, Path] = {}

    def build() -> dict[str, Any]:
        library()
        began = time.time()
        made["program"] = program(Path(given.headers))
        return {"compile_s": round(time.time() - began, 1)}

    with tempfile.TemporaryDirectory() as scratch:
        rows.measure("cpp/build", build)
        if "program" not in made:
            return
        bundle = Bundle.open(Path(given.bundle) if given.bundle else tiny_bundle(Path(scratch)))
        measure(rows, [str(made["program"]), str(bundle.directory), "1", str(CONTEXT), "cuda"], bundle)


def measure(rows: Rows, command: list[str], bundle: Any) -> None:
    """Write the rows of a bundle."""
    opened: list[Bench] = []

    def load() -> dict[str, Any]:
        opened.append(Bench(*command, *(["cpu"] if rows.dry else [])))
        return {"load_s": round(opened[0].load_s, 3)}

    def sessions() -> dict[str, Any]:
        turns = 3 if rows.dry else 12
        answer = opened[0].ask(load=LOAD, prompt=PROMPT, tokens=16, workers=4, turns=turns)
        return answer | {"swap_s": round(float(np.median(answer["swap_s"])), 4)}

    rows.measure("cpp/load", load)
    try:
        if opened:
            rows.measure("cpp/decode", lambda: compare(opened[0], bundle, rows.dry))
            rows.measure("cpp/sessions", sessions)
    finally:
        for one in opened:
            one.close()


if __name__ == "__main__":
    run(main)
