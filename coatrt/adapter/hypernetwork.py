"""The hypernetwork θ: a configuration → one r × r update U per matrix, all matrices in one batch."""

import torch
from torch import Tensor, nn

from coatrt.adapter.features import FEATURES, FIELD_SIZES
from coatrt.adapter.preset import Preset

__all__ = ["Hypernetwork"]

_WIDTH = 8  # of each embedding
_HIDDEN = 128  # width of the hidden layer


class Hypernetwork(nn.Module):
    """Embeddings → LayerNorm → (numbers appended) → Linear → SiLU → Linear; the output starts at zero: plain LoRA.

    Args:
        preset: "paper" uses the seven index fields (arXiv 2509.25214), "coatrt" also the numbers of
            `coatrt.adapter.features.FEATURES`.
        rank: r.
        layers: decoder layers of the model.
        modules: number of target module kinds.
    """

    def __init__(self, preset: Preset, rank: int, layers: int, modules: int) -> None:
        super().__init__()
        self.preset, self.rank = preset, rank
        vocabularies = (*FIELD_SIZES, layers, modules)
        width = _WIDTH * len(vocabularies)
        self.embeddings = nn.ModuleList(nn.Embedding(rows, _WIDTH) for rows in vocabularies)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width + (len(FEATURES) if preset == "coatrt" else 0), _HIDDEN)
        self.out = nn.Linear(_HIDDEN, rank**2)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, indices: Tensor, features: Tensor) -> Tensor:
        """Return U, float32 [M, r, r].

        Args:
            indices: int64 [M, 7], see `ConfigEncoder.indices`.
            features: float32 [M, 4], see `ConfigEncoder.features`; the preset "paper" ignores them.
        """
        inputs = self.norm(torch.cat([table(indices[:, i]) for i, table in enumerate(self.embeddings)], 1))
        if self.preset == "coatrt":
            inputs = torch.cat([inputs, features], 1)
        out: Tensor = self.out(nn.functional.silu(self.hidden(inputs)))
        return out.view(-1, self.rank, self.rank)
