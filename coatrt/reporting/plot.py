"""Bits per matrix of several configurations, drawn."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from coatrt.configs.config import QuantConfig
from coatrt.models.matrices import ModelMatrices
from coatrt.system.files import atomic_file

__all__ = ["plot_bits"]


def plot_bits(path: str | Path, model: ModelMatrices, configs: Mapping[str, QuantConfig]) -> None:
    """Write a PNG with one panel per configuration: module kinds down, layers across, bits per weight as colour.

    Args:
        path: the file, written atomically.
        model: the matrices.
        configs: title → configuration.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = list(dict.fromkeys(matrix.kind for matrix in model.targets))
    layers = 1 + max(matrix.layer for matrix in model.targets)
    tables = [matrix for matrix in model.matrices if matrix.is_table]
    figure, axes = plt.subplots(
        len(configs), 1, figsize=(11, 0.9 + 2.1 * len(configs)), squeeze=False, layout="constrained", sharex=True
    )
    for axis, (title, config) in zip(axes[:, 0], configs.items(), strict=True):
        bits = np.full((len(kinds), layers), np.nan)
        for matrix in model.targets:
            fmt = config[matrix.name].effective(matrix.K)
            bits[kinds.index(matrix.kind), matrix.layer] = fmt.bits_per_weight(matrix.K)
        image = axis.imshow(bits, aspect="auto", vmin=2, vmax=9, cmap="viridis")
        axis.set_yticks(range(len(kinds)), kinds, fontsize=8)
        outside = ", ".join(f"{matrix.kind} {config[matrix.name]}" for matrix in tables)
        axis.set_title(
            f"{title}: {config.average_bits(model):.2f} bits per weight on average  ({outside})",
            loc="left",
            fontsize=10,
        )
        for (row, column), value in np.ndenumerate(bits):
            colour = "white" if value < 6 else "black"
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=5.5, color=colour)
    axes[-1, 0].set_xlabel("decoder layer")
    figure.colorbar(image, ax=axes[:, 0].tolist(), label="bits per weight, scales included", shrink=0.8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
