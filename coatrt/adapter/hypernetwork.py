"""The hypernetwork θ: a configuration → one r × r update U per matrix, all matrices in one batch."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coatrt.adapter.features import FEATURES, FIELD_SIZES
from coatrt.adapter.preset import Preset
from coatrt.errors import ConfigError

__all__ = ["Hypernetwork", "HypernetworkOptions"]


@dataclass(frozen=True)
class HypernetworkOptions:
    """Shape of θ.

    Args:
        preset: "paper" sees the seven index fields (arXiv 2509.25214); "coatrt" also the numbers of
            `coatrt.adapter.features.FEATURES`.
        rank: r.
        layers: decoder layers of the model.
        modules: module kinds of the model.
        width: width of each embedding.
        hidden: width of the hidden layer.

    Raises:
        ConfigError: an unknown preset.
    """

    preset: Preset
    rank: int
    layers: int
    modules: int
    width: int = 8
    hidden: int = 128

    def __post_init__(self) -> None:
        if self.preset not in ("coatrt", "paper"):
            raise ConfigError(f"unknown hypernetwork preset {self.preset!r}; allowed: coatrt, paper")

    @property
    def vocabularies(self) -> tuple[int, ...]:
        """Rows of the seven embedding tables."""
        return (*FIELD_SIZES, self.layers, self.modules)

    @property
    def features(self) -> int:
        """Numbers seen beside the index fields."""
        return len(FEATURES) if self.preset == "coatrt" else 0


class Hypernetwork(nn.Module):
    """Embeddings → LayerNorm → (numbers appended) → Linear → SiLU → Linear; the output starts at zero: plain LoRA.

    Args:
        options: shape of θ.
    """

    def __init__(self, options: HypernetworkOptions) -> None:
        super().__init__()
        self.options = options
        self.embeddings = nn.ModuleList(nn.Embedding(rows, options.width) for rows in options.vocabularies)
        width = options.width * len(options.vocabularies)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width + options.features, options.hidden)
        self.out = nn.Linear(options.hidden, options.rank**2)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, indices: Tensor, features: Tensor) -> Tensor:
        """Return U, float32 [M, r, r].

        Args:
            indices: int64 [M, 7], see `ConfigEncoder.indices`.
            features: float32 [M, 4], see `ConfigEncoder.features`; the paper's preset ignores them.
        """
        seen = self.norm(torch.cat([table(indices[:, i]) for i, table in enumerate(self.embeddings)], 1))
        if self.options.features:
            seen = torch.cat([seen, features], 1)
        out: Tensor = self.out(nn.functional.silu(self.hidden(seen)))
        return out.view(-1, self.options.rank, self.options.rank)
