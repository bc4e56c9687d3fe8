"""Bytes of an engine beyond its weights: kernel sources and graph text, a model fitted to engines that were built.

TensorRT-RTX keeps the sources of its generated kernels in the engine: some for every layer (the fused attention, and on
SM75 the norms), some once per format. `benchmarks/engine_overhead.py` fits the numbers and writes engine_size.json.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.models.matrices import ModelMatrices
from coatrt.quantization.weight_format import WeightFormat

__all__ = ["EngineSize", "engine_overhead", "overhead_of_choices"]


@dataclass(frozen=True)
class EngineSize:
    """The fitted numbers.

    Args:
        base: bytes of any engine.
        per_layer: bytes for each decoder layer.
        per_layer_sm75: bytes for each decoder layer more on SM75.
        per_format: kind of format → bytes of its kernels, once an engine, beyond those of fp16.
        nvfp4_padding: share of an nvfp4 matrix that is added where its rows are not a multiple of 128, the tile of its
            block scales.
    """

    base: int
    per_layer: int
    per_layer_sm75: int
    per_format: Mapping[str, int]
    nvfp4_padding: float

    def of_kind(self, kind: str) -> int:
        """Return the bytes of a format's kernels; nf8 was not built and counts as nf4."""
        return self.per_format.get("nf4" if kind == "nf8" else kind, 0)


SIZE = EngineSize(**json.loads(resources.files("coatrt.planning").joinpath("engine_size.json").read_text("utf-8")))
"""What engine_size.json holds."""

CPU_PACKED = ("int8", "int4")
"""Kinds that ONNX Runtime can keep packed; all others are decoded to 4 bytes a weight when a graph loads."""


def _fixed(model: ModelMatrices, sm: int) -> int:
    layers = 1 + max(matrix.layer for matrix in model.matrices)
    return SIZE.base + layers * (SIZE.per_layer + (SIZE.per_layer_sm75 if sm == 75 else 0))


def _added(fmt: WeightFormat, N: int, K: int, sm: int) -> int:
    """Return the bytes that one matrix takes beyond its codes and scales."""
    if sm == 0:
        return 0 if fmt.kind in CPU_PACKED else 4 * N * K - fmt.nbytes(N, K)
    return int(SIZE.nvfp4_padding * fmt.nbytes(N, K)) if fmt.kind == "nvfp4" and N % 128 else 0


def engine_overhead(config: QuantConfig, model: ModelMatrices, sm: int) -> int:
    """Return the bytes of an engine beyond weights, scales and other tensors, for a compute capability (SM86: 86).

    The CPU (0) has no engine: there it is the weights that ONNX Runtime decodes to float32 at load; int8 and int4 stay
    packed at accuracy levels 1 and 4.
    """
    added = sum(_added(config[matrix.name], matrix.N, matrix.K, sm) for matrix in model.matrices)
    if sm == 0:
        return added
    used = {fmt.kind for fmt in config.formats.values()}
    return _fixed(model, sm) + sum(map(SIZE.of_kind, used)) + added


def overhead_of_choices(space: ConfigSpace, choices: NDArray[np.int16], sm: int) -> NDArray[np.int64]:
    """Return `engine_overhead` [n] of configurations as format numbers of every group [n, groups]."""
    total = np.full(len(choices), _fixed(space.model, sm) if sm else 0, np.int64)
    for kind in {fmt.kind for fmt in space.formats} if sm else ():
        of_kind = np.array([fmt.kind == kind for fmt in space.formats])
        total += SIZE.of_kind(kind) * of_kind[choices].any(1)
    by_name = space.model.by_name
    added = np.array(
        [
            [sum(_added(fmt, by_name[name].N, by_name[name].K, sm) for name in group) for fmt in space.formats]
            for group in space.groups
        ]
    )
    total += added[np.arange(len(added)), choices].sum(1)
    return total
