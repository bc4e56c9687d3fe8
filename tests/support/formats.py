"""Formats and configurations that several tests use."""

import numpy as np

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.quantization.weight_format import SCALE_BLOCKS, SCALE_DTYPES, WeightFormat

PAPER_FORMATS = tuple(
    WeightFormat(f"nf{b}", B0, b0, b1, B1)
    for b in (2, 3, 4, 8)
    for b0 in (2, 3, 4, 8)
    for b1 in SCALE_DTYPES[1:]
    for B0 in (16, 32, 64)
    for B1 in SCALE_BLOCKS[1:]
)
"""The 432 formats of arXiv 2509.25214."""


def random_config(space: ConfigSpace, rng: np.random.Generator) -> QuantConfig:
    """Return a configuration with the format of every group drawn uniformly and independently."""
    return space.config(rng.integers(len(space.formats), size=len(space.groups)))
