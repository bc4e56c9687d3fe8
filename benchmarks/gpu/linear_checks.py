"""Checks of the packed products without a GPU: the packing against coatrt's, and refusals."""

from pathlib import Path
from typing import Any

import numpy as np
from decoder import RANK
from packed import BLOCKS, CODES, Packed, linear, pack, random_packed
from products import Graph
from runtime import session

__all__ = ["ERRORS", "GROUPS", "TEXTS", "group_weights", "layout", "one_node", "refusals"]

TEXTS = ("int4-g64", "int4-g128", "int8", "int8-g128", "nvfp4", "fp8", "nf2-g16", "nf2-g64", "nf3-g64", "nf4-g32")
GROUPS: dict[str, tuple[int, tuple[int, ...]]] = {
    "7b-qkv": (4096, (4096, 1024, 1024)),
    "7b-o": (4096, (4096,)),
    "7b-down": (14336, (4096,)),
    "1b-gate_up": (2048, (8192, 8192)),
    "135m-qkv": (576, (576, 192, 192)),
    "135m-down": (1536, (576,)),
    "odd": (1000, (272, 48)),
}
"""Name → (K, the widths of the matrices that read one input)."""
ERRORS = (
    ("7b-qkv", ("int4", "int4", "int4")),
    ("odd", ("int4", "int8")),
    ("135m-qkv", ("nf3", "nf2", "nf4")),
    ("7b-qkv", ("nf3", "int8", "nvfp4")),
    ("1b-gate_up", ("nf4", "nf2")),
    ("odd", ("nvfp4", "fp8")),
    ("7b-down", ("nf3",)),
    *(("7b-o", (kind,)) for kind in CODES),
    *(("135m-down", (kind,)) for kind in CODES),
)
REFUSED: dict[str, tuple[int, int, list[tuple[str, int, int]]]] = {
    "K": (1004, 0, [("int4", 64, 64)]),
    "N of 4 bits": (64, 0, [("int4", 24, 64)]),
    "N of 8 bits": (64, 0, [("fp8", 20, 0)]),
    "block": (64, 0, [("int8", 64, 24)]),
    "block of nvfp4": (64, 0, [("nvfp4", 64, 32)]),
    "no block": (64, 0, [("nf3", 64, 0)]),
    "segments": (528, 0, [("nf3", 64, 16)]),
    "five matrices": (64, 0, [("int8", 64, 0)] * 5),
    "mode": (64, 2, [("int8", 64, 0)] * 2),
    "gated, one matrix": (64, 1, [("int8", 64, 0)]),
    "gated, two widths": (64, 1, [("int8", 64, 0), ("int8", 32, 0)]),
}
"""What is wrong → K, mode, (kind, N, block) of each matrix."""


def _block(kind: str, K: int) -> int:
    """Return the block of a random matrix; int8 has one scale per column where 128 does not divide K."""
    return 0 if kind == "int8" and K % 128 else BLOCKS[kind]


def group_weights(name: str, kinds: tuple[str, ...]) -> dict[str, Packed]:
    """Return random matrices of one of GROUPS, one kind each."""
    K, widths = GROUPS[name]
    pairs = zip(kinds, widths, strict=True)
    return {f"w{i}": random_packed(kind, N, K, _block(kind, K)) for i, (kind, N) in enumerate(pairs)}


def one_node(path: Path, m: int, weights: dict[str, Packed], lora: bool, gated: bool = False) -> tuple[Graph, str]:
    """Return a graph x → Linear → output for m rows, and the output's name."""
    graph = Graph(library=str(path))
    graph.input("x", np.float16, [m, next(iter(weights.values())).K])
    out, _ = linear(graph, "x", "node", weights, RANK if lora else 0, gated)
    widths = [weight.N for weight in weights.values()]
    graph.output(out, np.float16, [m, widths[0] if gated else sum(widths)])
    return graph, out


def layout(text: str) -> dict[str, Any]:
    """Compare bytes and decoded weights of one format with coatrt's; its blocks do not divide K."""
    from stored_weight import stored_weight

    N, K = 48, 208 if text == "nf2-g16" else 200
    stored = stored_weight(text, N, K)
    kind = text.split("-")[0]
    planes = pack(kind, stored.codes)
    if [plane.tobytes() for plane in planes] != stored.planes:
        raise AssertionError("the bytes differ from those that coatrt stores")
    matrix = Packed(
        kind,
        N,
        K,
        stored.block,
        [np.frombuffer(plane, np.uint8) for plane in stored.planes],
        stored.scales,
        256 * stored.constant if kind == "nvfp4" else 1.0,
        stored.levels,
    )
    if not np.array_equal(matrix.dense().astype(np.float16), stored.dense):
        raise AssertionError("the weights differ from those that coatrt decodes")
    return {"bytes": sum(map(len, stored.planes)), "padded_k": len(stored.codes), "equal": True}


def _answer(graph: Graph) -> str:
    """Return the operator's message for zeros as inputs, without a GPU."""
    try:
        made = session(graph.model(), graph.weights, dry=True, level="none", library=graph.library)
        types = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
        made.run(None, {value.name: np.zeros(value.shape, types[value.type]) for value in made.get_inputs()})
    except Exception as error:
        said = str(error)
        return said[said.find("coatrt::Linear: ") + 16 :] if "coatrt::Linear: " in said else f"not refused: {said}"
    return "not refused"


def _wrong_inputs(path: Path) -> dict[str, Graph]:
    """Return graphs with right attributes and one wrong input each."""

    def graph() -> Graph:
        weights = {f"w{i}": random_packed(kind, 64, 128) for i, kind in enumerate(("int4", "nf3"))}
        return one_node(path, 1, weights, lora=True)[0]

    found = {
        what: graph() for what in ("x", "codes", "scales in float32", "A in float32", "A transposed", "LoRA of one")
    }
    for name, value, kind, shape in (
        ("x", "x", np.float16, [1, 120]),
        ("A in float32", "node.w0.A", np.float32, [128, RANK]),
        ("A transposed", "node.w0.A", np.float16, [RANK, 128]),
    ):
        inputs = found[name].inputs
        at = next(i for i, known in enumerate(inputs) if known.name == value)
        del inputs[at]
        found[name].input(value, kind, shape)
    weights = found["codes"].weights
    weights["node.w0.codes"] = weights["node.w0.codes"][:-8]
    weights = found["scales in float32"].weights
    weights["node.w1.scales"] = weights["node.w1.scales"].astype(np.float32)
    node = found["LoRA of one"].nodes[0]
    del node.input[-2:]
    del found["LoRA of one"].inputs[-2:]
    return found


def refusals(path: Path) -> dict[str, Any]:
    """Return the operator's messages for wrong attributes and inputs; right ones must pass."""
    right = 0
    for name, kinds in ERRORS:
        if GROUPS[name][0] < 2048:
            weights = group_weights(name, kinds)
            for lora in (True, False):
                said = _answer(one_node(path, 3, weights, lora)[0])
                if "the inputs are right" not in said:
                    raise AssertionError(f"{name} {kinds}: {said}")
                right += 1
    graphs = _wrong_inputs(path)
    for what, (K, mode, matrices) in REFUSED.items():
        weights = {f"w{i}": random_packed(kind, N, K, block) for i, (kind, N, block) in enumerate(matrices)}
        graphs[what], _ = one_node(path, 1, weights, lora=False)
        next(part for part in graphs[what].nodes[0].attribute if part.name == "mode").i = mode
    found = {what: _answer(graph) for what, graph in graphs.items()}
    if missing := [what for what, said in found.items() if said.startswith("not refused") or "are right" in said]:
        raise AssertionError(f"not refused as they should be: { {what: found[what] for what in missing} }"[:500])
    return {"right": right, "refused": found}
