"""Bytes of an engine beyond its weights: kernel sources and graph text, a model fitted to engines that were built.

TensorRT-RTX 1.7.1 keeps the sources of its generated kernels in the engine: some for every layer (the fused attention,
and on SM75 the norms), some once per format. The numbers are a least-squares fit to the engines of
benchmarks/results/engine_overhead.json (docs/planning.md says how they were built).
"""

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.models.matrices import ModelMatrices
from coatrt.quantization.weight_format import KINDS, WeightFormat

__all__ = ["engine_overhead", "overhead_of_choices"]

BASE = 2_160_000
PER_LAYER = 276_000
PER_LAYER_SM75 = 266_000
PER_FORMAT = {
    "fp16": 0,
    "bf16": 0,
    "int8": 840_000,
    "int4": 330_000,
    "fp8": 1_040_000,
    "nvfp4": 1_100_000,
    "nf2": 1_270_000,
    "nf3": 1_620_000,
    "nf4": 1_270_000,
    "nf8": 1_270_000,
}
"""Kernels of a format, once an engine; nf8 was not built and counts as nf4."""

NVFP4_PADDING = 0.07
"""Share of an nvfp4 matrix that is added where its rows are no multiple of 128, the tile of its block scales."""

CPU_PACKED = ("int8", "int4")
"""Kinds that ONNX Runtime can keep packed; all others are decoded to 4 bytes a weight when a graph loads."""


def _fixed(model: ModelMatrices, sm: int) -> int:
    layers = 1 + max(matrix.layer for matrix in model.matrices)
    return BASE + layers * (PER_LAYER + (PER_LAYER_SM75 if sm == 75 else 0))


def _added(fmt: WeightFormat, N: int, K: int, sm: int) -> int:
    """Return the bytes that one matrix takes beyond its codes and scales."""
    if sm == 0:
        return 0 if fmt.kind in CPU_PACKED else 4 * N * K - fmt.nbytes(N, K)
    return int(NVFP4_PADDING * fmt.nbytes(N, K)) if fmt.kind == "nvfp4" and N % 128 else 0


def engine_overhead(config: QuantConfig, model: ModelMatrices, sm: int) -> int:
    """Return the bytes of an engine beyond weights, scales and other tensors.

    The CPU has no engine: there it is what ONNX Runtime decodes to float32 at load, int8 and int4 staying packed
    (accuracy levels 1 and 4; at level 0 these are decoded too).

    Args:
        config: the configuration.
        model: its matrices.
        sm: compute capability, as in SM86: 86.
    """
    added = sum(_added(config[matrix.name], matrix.N, matrix.K, sm) for matrix in model.matrices)
    if sm == 0:
        return added
    used = {fmt.kind for fmt in config.formats.values()}
    return _fixed(model, sm) + sum(PER_FORMAT[kind] for kind in used) + added


def overhead_of_choices(space: ConfigSpace, choices: NDArray[np.int16], sm: int) -> NDArray[np.int64]:
    """Return `engine_overhead` of many configurations, [n], given the format number of every group, [n, groups]."""
    total = np.full(len(choices), _fixed(space.model, sm) if sm else 0, np.int64)
    kinds = [fmt.kind for fmt in space.formats]
    for kind in KINDS:
        of_kind = np.array([other == kind for other in kinds])
        if sm and of_kind.any() and PER_FORMAT[kind]:
            total += PER_FORMAT[kind] * of_kind[choices].any(1)
    by_name = space.model.by_name
    added = np.array(
        [
            [sum(_added(fmt, by_name[name].N, by_name[name].K, sm) for name in group) for fmt in space.formats]
            for group in space.groups
        ]
    )
    if added.any():
        total += added[np.arange(len(added)), choices].sum(1)
    return total
