"""Weights packed like weights.bin, in numpy: random ones, the inputs of the operator, and their float32 values.

Codes and scales are padded to whole blocks along K, as in the graph form for engines. int4 and nvfp4 hold two columns a
byte, the first in the low half; int8 and fp8 one. NormalFloat codes are cut into planes of bits packed along K, whose
bytes have their top bit flipped (`export/weights/packing.py`).
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from products import E2M1, SPREAD, Graph

__all__ = ["BLOCKS", "CODES", "Packed", "linear", "pack", "random_packed"]

CODES = {"int4": 0, "int8": 1, "nvfp4": 2, "fp8": 3, "nf2": 4, "nf3": 5, "nf4": 6}
"""Kind of a format → its number in kernels/packed.cuh."""
BLOCKS = {"int4": 64, "int8": 128, "nvfp4": 16, "fp8": 0, "nf2": 64, "nf3": 64, "nf4": 64}
"""Kind → weights that share a scale in random weights; 0: one scale per column."""
LEVELS = {
    "nf2": np.array([-1.0, -0.3, 0.25, 1.0], np.float16),
    "nf3": np.array([-1.0, -0.62, -0.35, -0.1, 0.12, 0.4, 0.68, 1.0], np.float16),
    "nf4": np.linspace(-1, 1, 16).round(4).astype(np.float16),
}
"""Kind → codebook of random weights: the operator takes any levels."""
_PLANES = {"nf2": (2,), "nf3": (2, 1), "nf4": (4,)}  # bits of the planes, low bits first
_DEVIATIONS = {"int4": 4.6, "int8": 40, "nvfp4": 3, "fp8": 60, "nf2": 0.7, "nf3": 0.6, "nf4": 0.6}  # of random codes


def pack(kind: str, codes: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Return the stored bytes of codes [Kp, N], one array a plane."""
    if kind in ("int8", "fp8"):
        return [codes]
    if kind in ("int4", "nvfp4"):
        return [(codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)]
    planes, shift = [], 0
    for width in _PLANES[kind]:
        segments = np.split(codes >> shift & ((1 << width) - 1), 8 // width)
        packed = np.full_like(segments[0], 128)
        for position, segment in enumerate(segments):
            packed ^= segment << (position * width)
        planes.append(packed)
        shift += width
    return planes


def _unpacked(kind: str, planes: list[NDArray[np.uint8]], N: int) -> NDArray[np.uint8]:
    """Return the codes [Kp, N] in the order in which kernels/packed.cuh reads the bytes."""
    rows = [plane.reshape(-1, N // 2 if kind in ("int4", "nvfp4") else N) for plane in planes]
    if kind in ("int8", "fp8"):
        return rows[0]
    if kind in ("int4", "nvfp4"):
        return np.stack([rows[0] & 15, rows[0] >> 4], axis=-1).reshape(-1, N)
    codes: Any = np.uint8(0)
    shift = 0
    for width, packed in zip(_PLANES[kind], rows, strict=True):
        segments = [(packed ^ 128) >> at & ((1 << width) - 1) for at in range(0, 8, width)]
        codes = codes | np.concatenate(segments) << shift
        shift += width
    return codes  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Packed:
    """One matrix [K, N].

    Args:
        kind: one of CODES.
        N: output width.
        K: input width.
        block: weights along K that share a scale; 0: one scale per column.
        planes: stored bytes, the low bits first.
        scales: [blocks, N] float16, or uint8 E4M3 for nvfp4.
        factor: what 1/256 of an nvfp4 scale is multiplied with; else 1.
        levels: the codebook of NormalFloat, float16.
    """

    kind: str
    N: int
    K: int
    block: int
    planes: list[NDArray[np.uint8]]
    scales: NDArray[Any]
    factor: float = 1.0
    levels: NDArray[np.float16] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.scales.nbytes + sum(plane.nbytes for plane in self.planes)

    def dense(self) -> NDArray[np.float32]:
        """Return the float32 weight [K, N]: level × scale."""
        codes = _unpacked(self.kind, self.planes, self.N)
        if self.levels is not None:
            values = self.levels[codes]
        elif self.kind == "int4":
            values = (codes ^ 8).astype(np.int8) - 8
        elif self.kind == "int8":
            values = codes.view(np.int8)
        else:
            values = E2M1[codes] if self.kind == "nvfp4" else codes.view(ml_dtypes.float8_e4m3fn)
        scales = self.scales
        if self.kind == "nvfp4":
            scales = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * (self.factor / 256)
        blocks = values.astype(np.float32).reshape(len(scales), -1, self.N)
        return (blocks * scales.astype(np.float32)[:, None]).reshape(-1, self.N)[: self.K]


@cache
def random_packed(kind: str, N: int, K: int, block: int | None = None) -> Packed:
    """Return random weights; the same object for the same arguments, so that layers share host memory.

    Args:
        kind: one of CODES.
        N: output width.
        K: input width.
        block: see Packed; None takes that of BLOCKS.
    """
    rng = np.random.default_rng(CODES[kind] * 7 + N + K)
    block = BLOCKS[kind] if block is None else block
    rows = -(-K // (block or K)) * (block or K)
    sizes = {"int4": [rows * N // 2], "nf2": [rows * N // 4], "nf3": [rows * N // 4, rows * N // 8]}
    planes = [rng.integers(0, 256, size, np.uint8) for size in sizes.get(kind, [rows * N // 2])]
    if kind == "int8":
        planes = [(rng.standard_normal(rows * N, np.float32) * 40).clip(-127, 127).astype(np.int8).view(np.uint8)]
    elif kind == "fp8":  # the sign, and magnitudes below the NaN's
        planes = [rng.integers(0, 120, rows * N, np.uint8) | rng.integers(0, 2, rows * N, np.uint8) << 7]
    steps = SPREAD / _DEVIATIONS[kind] * (1 + rng.random((rows // (block or K), N), np.float32))
    if kind == "nvfp4":
        scales = (steps * 4096).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        return Packed(kind, N, K, block, planes, scales, factor=256 / 4096)
    signs = rng.integers(0, 2, steps.shape, np.int8) * 2 - 1  # the mean of integers' codes is −0.5, which adds up
    return Packed(kind, N, K, block, planes, (steps * signs).astype(np.float16), levels=LEVELS.get(kind))


def linear(
    graph: Graph, x: str, name: str, weights: dict[str, Packed], rank: int, gated: bool = False
) -> tuple[str, dict[str, tuple[Any, tuple[int, ...]]]]:
    """Add coatrt::Linear for matrices that read one input, and return its output and the graph inputs of the LoRA.

    Args:
        graph: the graph.
        x: name of the activations.
        name: prefix of the new names.
        weights: name → matrix.
        rank: of the LoRA; 0: none.
        gated: return silu(first result) · second result instead of the results side by side.
    """
    inputs, lora = [x], {}
    for part, weight in weights.items():
        prefix, arrays = f"{name}.{part}", {"codes": weight.planes[0], "scales": weight.scales}
        if len(weight.planes) > 1:
            arrays["plane"] = weight.planes[1]
        inputs += [graph.weight(f"{prefix}.{label}", array) for label, array in arrays.items()]
        if weight.levels is not None:
            inputs.append(graph.weight(f"levels.{weight.kind}", weight.levels))
        if rank:
            shapes = {f"{prefix}.A": (weight.K, rank), f"{prefix}.B": (rank, weight.N)}
            inputs += [graph.input(label, np.float16, list(shape)) for label, shape in shapes.items()]
            lora |= {label: (np.float16, shape) for label, shape in shapes.items()}
    first = next(iter(weights.values()))
    attributes = {
        "formats": [CODES[weight.kind] for weight in weights.values()],
        "widths": [weight.N for weight in weights.values()],
        "blocks": [weight.block for weight in weights.values()],
        "factors": [float(weight.factor) for weight in weights.values()],
    }
    shared = {"K": first.K, "mode": int(gated), "lora": int(rank > 0)}
    return graph.node("Linear", inputs, [f"{name}.out"], "coatrt", **attributes, **shared), lora
