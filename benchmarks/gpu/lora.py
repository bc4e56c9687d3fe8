"""Ways to multiply a LoRA that is given as graph inputs: (x·A)·B in several operators and dtypes."""

from typing import Any

import ml_dtypes
import numpy as np
import torch
from products import Graph, random_weight
from rows import Rows, arguments, run
from runtime import Bound, cold_copies, session, timed

__all__ = ["LORA_FORMS", "lora_update", "random_inputs"]

Inputs = dict[str, tuple[Any, tuple[int, ...]]]

LORA_FORMS = ("fp16", "transposed", "int8", "fp8")
"""fp16: MatMul of A [K, r] and B [r, N]. transposed: FusedMatMul of A [r, K] and B [N, r], rows along the inputs.
int8: MatMulNBits, blocks of 32 and 16. fp8: MatMulBlockQuantizedFp8Weight, a scale per row."""
RANK = 16
GROUPS = {
    "7b-qkv": (4096, (4096, 1024, 1024)),
    "7b-gate_up": (4096, (14336, 14336)),
    "7b-down": (14336, (4096,)),
    "1b-gate_up": (2048, (8192, 8192)),
    "135m-qkv": (576, (576, 192, 192)),
    "135m-down": (1536, (576,)),
}
"""Name → (K, the widths of the matrices that read the same input)."""


def lora_update(
    graph: Graph, form: str, x: str, name: str, K: int, N: int, rank: int, bias: str = ""
) -> tuple[str, Inputs]:
    """Add (x·A)·B and return it and the graph inputs it takes.

    Args:
        graph: the graph.
        form: one of LORA_FORMS.
        x: name of the activations.
        name: prefix of the new names.
        K: input width.
        N: output width.
        rank: of the LoRA.
        bias: a value [N] that the second product adds; int8 and fp8 only.
    """
    inputs: Inputs = {}

    def given(label: str, kind: Any, *shape: int) -> str:
        inputs[f"{name}.{label}"] = (kind, shape)
        return graph.input(f"{name}.{label}", kind, list(shape))

    def product(left: str, label: str, wide: int, high: int, more: str = "") -> str:
        out = [f"{name}.{'low' if label == 'A' else 'update'}"]
        if form == "fp16":
            return graph.node("MatMul", [left, given(label, np.float16, wide, high)], out)
        if form == "transposed":
            stored = given(label, np.float16, high, wide)
            return graph.node("FusedMatMul", [left, stored], out, "com.microsoft", transB=1)
        if form == "fp8":
            stored = given(label, ml_dtypes.float8_e4m3fn, high, wide), given(f"{label}.scale", np.float32, high, 1)
            nothing = ["", more] if more else []
            operator, attributes = "MatMulBlockQuantizedFp8Weight", {"block_size": wide}
            return graph.node(operator, [left, *stored, *nothing], out, "com.microsoft", **attributes)
        block = 32 if wide % 32 == 0 else 16
        stored = (
            given(label, np.uint8, high, wide // block, block),
            given(f"{label}.scale", np.float16, high, wide // block),
        )
        nothing = ["", "", more] if more else []
        return graph.node(
            "MatMulNBits", [left, *stored, *nothing], out, "com.microsoft", bits=8, block_size=block, N=high, K=wide
        )

    low = product(x, "A", K, rank)
    return product(low, "B", rank, N, bias), inputs


def random_inputs(inputs: Inputs, device: str) -> dict[str, torch.Tensor]:
    """Return random tensors for LoRA inputs; 8-bit floats as their bytes."""
    made = {}
    for name, (kind, shape) in inputs.items():
        values = torch.randn(shape, device=device)
        if kind == np.uint8:
            made[name] = (values * 30 + 128).clamp(0, 255).to(torch.uint8)
        elif kind == ml_dtypes.float8_e4m3fn:
            made[name] = values.to(torch.float8_e4m3fn)
        elif name.endswith(".scale"):
            made[name] = (0.02 / 30 * (1 + values.abs())).to(torch.float32 if kind == np.float32 else torch.float16)
        else:
            made[name] = (values * 0.02).half()
    return made


def _expected(form: str, x: torch.Tensor, tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    for label in "AB":
        stored = tensors[f"{name}.{label}"].float()
        if form == "int8":
            scale = tensors[f"{name}.{label}.scale"].float()
            stored = ((stored - 128) * scale[:, :, None]).flatten(1).T
        elif form == "fp8":
            stored = (stored * tensors[f"{name}.{label}.scale"].float()).T
        elif form == "transposed":
            stored = stored.T
        x = x @ stored
    return x


def case(name: str, form: str, way: str, m: int, dry: bool) -> dict[str, Any]:
    """Time one group of matrices in int4-g64, joined, with its LoRA joined (B is block-diagonal).

    Args:
        name: one of GROUPS.
        form: one of LORA_FORMS, or "none".
        way: "add" (its own Add), "gemm" (Gemm with beta, fp16 only) or "bias" (bias of the second product).
        m: rows.
        dry: tiny shapes on the CPU.
    """
    K, widths = (64, (64, 32)) if dry else GROUPS[name]
    N, rank = sum(widths), RANK * len(widths)
    copies = cold_copies(N * K // 2, dry=dry, most=24)
    graph, device = Graph(), "cpu" if dry else "cuda"
    tensors = {graph.input("x", np.float16, [m, K]): torch.randn(m, K, device=device).half()}
    flat = graph.constant("flat", np.array([-1], np.int64))
    every: Inputs = {}
    for i in range(copies):
        base = graph.product("x", random_weight("int4-g64", N, K), f"base{i}")
        out = f"base{i}"
        if form != "none" and way == "bias":
            bias = graph.node("Reshape", [base, flat], [f"bias{i}"])
            out, inputs = lora_update(graph, form, "x", f"lora{i}", K, N, rank, bias)
        elif form != "none":
            update, inputs = lora_update(graph, form, "x", f"lora{i}", K, N, rank)
            if way == "gemm":
                last = graph.nodes.pop()
                out = graph.node("Gemm", [*last.input, base], [f"sum{i}"])
            else:
                out = graph.node("Add", [base, update], [f"sum{i}"])
        if form != "none":
            every |= inputs
        graph.output(out, np.float16, [m, N])
        tensors[out] = torch.full((m, N), torch.nan, dtype=torch.float16, device=device)
    tensors |= random_inputs(every, device)
    made = session(graph.model(), graph.weights, dry=dry, graph=True, level="none")
    found: dict[str, Any] = {"us": timed(Bound(made, tensors, annotation=1), 30, dry=dry, parts=copies)}
    if form != "none":
        rows = 256 if N > 256 else N
        dense = torch.from_numpy(random_weight("int4-g64", N, K).dense(rows)).to(device)
        x = tensors["x"].float()
        expected = x @ dense.T + _expected(form, x, tensors, "lora0")[:, :rows]
        first = next(value.name for value in graph.outputs)
        found["relative_error"] = float((tensors[first][:, :rows].float() - expected).norm() / expected.norm())
    return found


def measure(rows: Rows, name: str, m: int) -> None:
    """Time every way for one group."""
    ways = [
        ("none", "add"),
        *((form, "add") for form in LORA_FORMS),
        ("fp16", "gemm"),
        ("int8", "bias"),
        ("fp8", "bias"),
    ]
    for form, way in ways:
        if way != "bias" or m == 1:
            key = f"lora/{name}/M{m}/{form}/{way}"
            rows.measure(key, lambda form=form, way=way: case(name, form, way, m, rows.dry))


def main() -> None:
    """Measure."""
    torch.backends.cuda.matmul.allow_tf32 = False
    rows, _ = arguments(__doc__.splitlines()[0])
    for name in list(GROUPS)[: 1 if rows.dry else None]:
        measure(rows, name, 1)
    for name in list(GROUPS)[: 0 if rows.dry else 2]:
        measure(rows, name, 512)


if __name__ == "__main__":
    run(main)
