"""Bytes of an engine beyond its weights: kernel sources and graph text, a model fitted to engines that were built.

TensorRT-RTX 1.7.1 keeps the sources of its generated kernels in the engine: some for every layer (the fused attention,
and on SM75 the norms), some once per format. The numbers are a least-squares fit to the engines of
benchmarks/results/engine_overhead.json (`python benchmarks/engine_overhead.py`).
"""

import numpy as np
from numpy.typing import NDArray

from coatrt.config import QuantConfig
from coatrt.formats import KINDS, WeightFormat
from coatrt.matrices import ModelMatrices
from coatrt.space import ConfigSpace

__all__ = ["engine_overhead", "overhead_of_choices"]

BASE = 1_500_000
PER_LAYER = 300_000
PER_LAYER_SM75 = 260_000
PER_FORMAT = {"fp16": 0, "bf16": 0, "int8": 770_000, "int4": 260_000, "fp8": 700_000, "nvfp4": 700_000,
              "nf2": 1_300_000, "nf3": 1_550_000, "nf4": 1_300_000, "nf8": 1_300_000}  # fmt: skip
PER_BYTE = {"nvfp4": 0.0}
"""Share of a matrix's ideal bytes that its layout in the engine adds."""


def _fixed(model: ModelMatrices, sm: int) -> int:
    layers = 1 + max(matrix.layer for matrix in model.matrices)
    return BASE + layers * (PER_LAYER + (PER_LAYER_SM75 if sm == 75 else 0))


def _added(fmt: WeightFormat, N: int, K: int) -> int:
    return int(PER_BYTE.get(fmt.kind, 0.0) * fmt.nbytes(N, K))


def engine_overhead(config: QuantConfig, model: ModelMatrices, sm: int) -> int:
    """Return the bytes of an engine beyond weights, scales and other tensors; 0 on the CPU, which has no engine.

    Args:
        config: the configuration.
        model: its matrices.
        sm: compute capability, as in SM86: 86.
    """
    if sm == 0:
        return 0
    used = {fmt.kind for fmt in config.formats.values()}
    added = sum(_added(config[matrix.name], matrix.N, matrix.K) for matrix in model.matrices)
    return _fixed(model, sm) + sum(PER_FORMAT[kind] for kind in used) + added


def overhead_of_choices(space: ConfigSpace, choices: NDArray[np.int16], sm: int) -> NDArray[np.int64]:
    """Return `engine_overhead` of many configurations, [n], given the format number of every group, [n, groups]."""
    if sm == 0:
        return np.zeros(len(choices), np.int64)
    total = np.full(len(choices), _fixed(space.model, sm), np.int64)
    kinds = [fmt.kind for fmt in space.formats]
    for kind in KINDS:
        of_kind = np.array([other == kind for other in kinds])
        if of_kind.any() and PER_FORMAT[kind]:
            total += PER_FORMAT[kind] * of_kind[choices].any(1)
    by_name = space.model.by_name
    added = np.array([
        [sum(_added(fmt, by_name[name].N, by_name[name].K) for name in group) for fmt in space.formats]
        for group in space.groups
    ])  # fmt: skip
    if added.any():
        total += added[np.arange(len(added)), choices].sum(1)
    return total
