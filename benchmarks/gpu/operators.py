"""Matrix products of ONNX Runtime by format and rows: microseconds, share of the bandwidth, error against torch."""

from typing import Any

import numpy as np
import torch
from products import Graph, Weight, random_weight
from rows import Rows, arguments, run
from runtime import Bound, cold_copies, session, timed

SHAPES = {
    "7b-gate_up": (28672, 4096),
    "7b-down": (4096, 14336),
    "7b-qkv": (6144, 4096),
    "1b-gate_up": (16384, 2048),
    "1b-down": (2048, 8192),
    "135m-gate_up": (3072, 576),
    "135m-down": (576, 1536),
    "7b-o": (4096, 4096),
}
"""Name → (N, K): Mistral 7B, Llama 3.2 1B and SmolLM2-135M, with q|k|v and gate|up as one product."""
FORMATS = (
    "int4-g32",
    "int4-g64",
    "fp16",
    "int8-g128",
    "nvfp4",
    "int4-g128",
    "int8-g64",
    "fp8",
    "nf4-g64",
    "int2-g64",
    "int8-g32",
    "fp8-g128",
    "int4-g32-zp",
    "int2-g32",
    "int2-g128",
    "nf4-g32",
    "int4-g64-zp",
)
CUTLASS = ("int4-g32", "int8-g32", "int4-g64", "int2-g64")
"""Formats also tried with the session key that asks for the CUTLASS product."""
FIRST = ("int4-g32", "int4-g64", "fp16", "int8-g128", "nvfp4", "fp8", "int4-g128")
M = (1, 4, 16, 128, 1024)
_CHECKED = 256  # rows of the weight whose products are compared with torch
_SUSPECT = 0.01  # relative error
KEY = {"ep.cuda.fpa_intb_gemm": "1"}


def product_times(rows: Rows, label: str, text: str, N: int, K: int, config: dict[str, str] | None = None) -> None:
    """Write one row per M for a format and shape, and one for what the session took.

    A graph holds the product several times, each with weights of its own, so that they come from memory rather than
    from the L2 cache; it is captured as a CUDA graph and replayed.
    """
    dry = rows.dry
    keys = {m: f"product/{label}/M{m}" for m in ((1, 4) if dry else M)}
    if rows.has(*keys.values()):
        return
    rows.check_time()
    weight = random_weight(text, N, K)
    copies = cold_copies(weight.nbytes, dry=dry)
    graph = Graph()
    graph.input("x", np.float16, ["M", K])
    for i in range(copies):
        graph.output(graph.product("x", weight, f"y{i}"), np.float16, ["M", N])
    made: list[Any] = []

    def load() -> dict[str, Any]:
        made.append(session(graph.model(), graph.weights, dry=dry, graph=True, config=config, level="none"))
        return {"copies": copies, "weight_bytes": weight.nbytes}

    rows.measure(f"product/{label}/load", load)
    if not made:  # refused just now, or measured in part by an earlier run
        return
    dense = torch.from_numpy(weight.dense(_CHECKED)).to("cpu" if dry else "cuda")
    for m, key in keys.items():
        rows.measure(key, lambda m=m: _one(made[0], dense, m, copies, weight, dry))


def _one(made: Any, dense: torch.Tensor, m: int, copies: int, weight: Weight, dry: bool) -> dict[str, Any]:
    N, K, device = weight.N, weight.K, dense.device
    x = torch.randn(m, K, generator=torch.Generator(device).manual_seed(m), device=device).half()
    outs = {f"y{i}": torch.full((m, N), torch.nan, dtype=torch.float16, device=device) for i in range(copies)}
    bound = Bound(made, {"x": x, **outs}, annotation=m)
    times = timed(bound, 20, dry=dry, parts=copies)
    expected = x.float() @ dense.T

    def error() -> float:
        differences = (outs[name][:, : len(dense)].float() - expected for name in ("y0", f"y{copies - 1}"))
        return max(float(difference.norm() / expected.norm()) for difference in differences)

    found: dict[str, Any] = {"us": times, "relative_error": error()}
    if not found["relative_error"] < _SUSPECT and not dry:  # NaN too; is it the operator or its capture?
        Bound(made, {"x": x, **outs})()
        torch.cuda.synchronize()
        found["relative_error_no_graph"] = error()
    moved = weight.nbytes + 2 * m * (K + N)
    rate = 2 * m * N * K / times["median"]
    return {**found, "gb_s": round(moved / times["median"] / 1e3, 1), "tflop_s": round(rate / 1e6, 2)}


def main() -> None:
    """Measure, the formats and shapes that matter most first."""
    torch.backends.cuda.matmul.allow_tf32 = False
    rows, _ = arguments(__doc__.splitlines()[0])
    shapes = {"tiny": (128, 256)} if rows.dry else SHAPES
    big = list(shapes)[:4]

    def measure(name: str, text: str) -> None:
        product_times(rows, f"{name}/{text}", text, *shapes[name])

    for text in FIRST:
        for name in big:
            measure(name, text)
    for text in CUTLASS:
        for name in big[:2]:
            product_times(rows, f"{name}/{text}+cutlass", text, *shapes[name], config=KEY)
    for name in shapes:
        for text in FIRST:
            measure(name, text)
    for text in FORMATS:
        for name in big[:2]:
            measure(name, text)
        random_weight.cache_clear()


if __name__ == "__main__":
    run(main)
