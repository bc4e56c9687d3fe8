"""Packed products with LoRA by kernels of our own (kernels/): errors against torch and whole decode steps.

    python examples/fetch_headers.py build/deps
    python benchmarks/gpu/linear.py --out rows [--headers build/deps/include/onnxruntime]

The section builds an ONNX Runtime operator out of kernels/ with nvcc and ONNX Runtime's headers, which
`examples/fetch_headers.py` puts into build/deps; --headers or ONNXRUNTIME_INCLUDE names another directory. A library
that is in build/gpu already, by the sources' digest, is used as it is: `--arch sm_90 --dry-run` makes it on a machine
without a GPU. A dry run compiles the sources, compares the packing with coatrt's, tries attributes that the operator
must refuse, and builds the graphs; the products need a GPU. The rows of the packing need coatrt.
"""

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import ATTENTION, Runner, kernels, measured
from decoder import MODELS, RANK, Decoder
from linear_checks import ERRORS, GROUPS, TEXTS, group_weights, layout, one_node, refusals
from packed import CODES, linear, random_packed
from products import Graph, random_weight
from rows import Rows, arguments, run
from runtime import Bound, session

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HEADERS = os.environ.get("ONNXRUNTIME_INCLUDE", str(ROOT / "build" / "deps" / "include" / "onnxruntime"))

STEPS: tuple[tuple[str, str, bool, tuple[tuple[str, str], ...]], ...] = (
    ("7b", "int4", True, ATTENTION[1]),
    ("7b", "int4", False, ATTENTION[1]),
    ("135m", "int4", True, ()),
    ("135m", "int4", False, ()),
    ("135m", "nf3", True, ()),
    ("7b", "nf3", True, ATTENTION[1]),
    ("1b", "int4", True, ()),
    ("1b", "int4", False, ()),
    ("7b", "int4", True, ()),
)
"""Model, kind of the weights, whether there is a LoRA, environment (cuDNN attention or ONNX Runtime's own choice)."""


def _nvcc() -> str | None:
    places = [shutil.which("nvcc"), *(f"{root}/bin/nvcc" for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"))]
    return next((place for place in places if place and Path(place).is_file()), None)


def library(headers: Path, arch: str) -> Path:
    """Return the operator's library, built unless it exists.

    Raises:
        FileNotFoundError: it does not, and there is no nvcc or no header.
        RuntimeError: nvcc fails.
    """
    sources = sorted((HERE / "kernels").iterdir())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    path = ROOT / "build" / "gpu" / f"linear-{arch}-{digest}.so"
    if path.exists():
        return path
    nvcc = _nvcc()
    if nvcc is None:
        raise FileNotFoundError(f"no nvcc on this machine and no {path}")
    if not (headers / "onnxruntime_cxx_api.h").is_file():
        raise FileNotFoundError(f"no onnxruntime_cxx_api.h in {headers}: run examples/fetch_headers.py build/deps")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    flags = ["-std=c++17", "-O3", f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
    command = [nvcc, *flags, "-I", str(headers), "-o", str(unfinished), str(HERE / "kernels" / "op.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[:400])
    unfinished.rename(path)
    return path


@cache
def _dense(name: str, kinds: tuple[str, ...]) -> list[torch.Tensor]:
    return [torch.from_numpy(weight.dense()).cuda() for weight in group_weights(name, kinds).values()]


def operator_error(path: Path, name: str, kinds: tuple[str, ...], m: int, lora: bool, gated: bool) -> dict[str, Any]:
    """Return the relative error (Frobenius norm) of one node against torch in float32."""
    weights = group_weights(name, kinds)
    graph, out = one_node(path, m, weights, lora, gated)
    made = session(graph.model(), graph.weights, dry=False, level="none", library=graph.library)
    generator = torch.Generator("cuda").manual_seed(m)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    shapes = {value.name: value.shape for value in made.get_inputs()}
    tensors = {label: (normal(*shape) * (1 if label == "x" else 0.02)).half() for label, shape in shapes.items()}
    tensors[out] = torch.full(made.get_outputs()[0].shape, torch.nan, device="cuda").half()
    torch.cuda.synchronize()
    Bound(made, tensors)()
    torch.cuda.synchronize()
    x, parts = tensors["x"].float(), []
    for label, dense in zip(weights, _dense(name, kinds), strict=True):
        parts.append(x @ dense)
        if lora:
            parts[-1] += x @ tensors[f"node.{label}.A"].float() @ tensors[f"node.{label}.B"].float()
    expected = torch.nn.functional.silu(parts[0]) * parts[1] if gated else torch.cat(parts, 1)
    return {"relative_error": float((tensors[out].float() - expected).norm() / expected.norm())}


def errors(rows: Rows, path: Path) -> None:
    """Write the error of every format alone and of mixed groups, in one piece of rows and in two."""
    for name, kinds in ERRORS:
        pair = len(kinds) == 2 and len(set(GROUPS[name][1])) == 1
        cases = [(1, True, False), (3, False, False), (8, True, False), (11, True, False), (1, True, True)]
        for case in cases if pair else cases[:-1]:
            m, lora, gated = case
            key = f"linear/error/{name}/{'+'.join(kinds)}/M{m}/LoRA {'on' if lora else 'off'}"
            work = partial(operator_error, path, name, kinds, *case)
            rows.measure(key + "/gated" * gated, work)
        _dense.cache_clear()


@dataclass
class PackedDecoder(Decoder):
    """The decoder with coatrt::Linear for every product; the embedding is float16, and the head has no LoRA."""

    def _linear_node(self, x: str, name: str, text: str, K: int, widths: dict[str, int], gated: bool = False) -> str:
        weights = {part: random_packed(text, N, K) for part, N in widths.items()}
        self.read_bytes += sum(weight.nbytes for weight in weights.values())
        out, inputs = linear(self.graph, x, name, weights, RANK if self.lora and name != "head" else 0, gated)
        self.lora_inputs |= inputs
        return out

    def _product(self, x: str, name: str, text: str, K: int, widths: dict[str, int]) -> list[str]:
        return [self._linear_node(x, name, text, K, widths)]

    def _last(self, x: str, name: str, text: str, K: int, N: int) -> tuple[str, ...]:
        return (self._linear_node(x, name, text, K, {"all": N}),)

    def _mlp(self, x: str, layer: int) -> tuple[str, ...]:
        shape, inner = self.shape, self.shape.inner
        widths = {"gate": inner, "up": inner}
        gated = self._linear_node(
            x, f"{layer}.gate_up", self.formats(layer, "gate_up"), shape.hidden, widths, gated=True
        )
        return self._last(gated, f"{layer}.down", self.formats(layer, "down"), inner, shape.hidden)

    def _embedded(self) -> str:
        table = random_weight("fp16", self.shape.hidden, self.shape.vocabulary).arrays["weight"]
        return self.graph.node("Gather", [self.graph.weight("table", table), "input_ids"], ["rows"], axis=0)

    def _head(self, x: str) -> None:
        shape = self.shape
        out = self._linear_node(x, "head", self.formats(-1, "head"), shape.hidden, {"all": shape.vocabulary})
        self.graph.node("Identity", [out], ["logits"])
        self.graph.output("logits", np.float16, [1, 1, shape.vocabulary])


def _built(decoder: Decoder) -> dict[str, Any]:
    """Return figures of a graph in an ONNX Runtime session, which checks the operator's attributes."""
    graph = decoder.graph
    session(graph.model(), graph.weights, dry=True, library=graph.library)
    facts = {"nodes": len(graph.nodes), "linear": sum(node.op_type == "Linear" for node in graph.nodes)}
    facts |= {"weight_bytes": decoder.read_bytes, "lora_inputs": len(decoder.lora_inputs)}
    return {**facts, "note": "built only: the products need a GPU"}


def steps(rows: Rows, path: Path, model: str, kind: str, lora: bool, environment: tuple[tuple[str, str], ...]) -> None:
    """Measure whole decode steps of one model in one format."""
    key = f"linear/{model}/{kind}/LoRA {'on' if lora else 'off'}" + "".join(f"/{name}" for name, _ in environment)
    keep: list[Runner] = []

    def work() -> dict[str, Any]:
        slots = 64 if rows.dry else 2048
        decoder = PackedDecoder(
            MODELS[model], lambda layer, group: kind, lora, slots=slots, graph=Graph(library=str(path))
        )
        if rows.dry:
            return _built(decoder)
        os.environ.update(environment)
        try:
            return measured(decoder, rows.dry, {}, keep)
        finally:
            for name, _ in environment:
                del os.environ[name]

    rows.measure(key, work)
    if keep and lora:
        rows.measure(f"kernels/{key}", lambda: kernels(keep[0]))


def main() -> None:
    """Check, then measure what matters most first."""
    rows, given = arguments(__doc__.splitlines()[0], headers=HEADERS, arch="")
    for text in TEXTS if rows.dry else ():
        rows.measure(f"linear/layout/{text}", lambda text=text: layout(text))
    arch = given.arch or "sm_90"
    if not given.arch and not rows.dry:
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    try:
        path = library(Path(given.headers), arch)
    except (FileNotFoundError, RuntimeError) as error:
        print(error, flush=True)
        rows.add("linear/library", skipped=str(error))
        return
    rows.add("linear/library", library=path.name)
    if rows.dry:
        rows.measure("linear/refusals", lambda: refusals(path))
        for kind in CODES:
            for lora in (True, False):
                steps(rows, path, "tiny", kind, lora, ())
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    for case in STEPS[:2]:
        steps(rows, path, *case)
    errors(rows, path)
    for case in STEPS[2:]:
        steps(rows, path, *case)


if __name__ == "__main__":
    run(main)
