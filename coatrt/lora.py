"""The configuration-aware LoRA as one module: A and B of all matrices stacked by shape, U from the hypernetwork."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from coatrt.config import QuantConfig
from coatrt.contract import LoraContract
from coatrt.features import ConfigEncoder
from coatrt.hypernet import Hypernetwork, HypernetworkOptions, Preset
from coatrt.train_options import TrainOptions

__all__ = ["CoaLora"]


class CoaLora(nn.Module):
    """y = Q(W)x + s·B(I + U)A x, with U = θ(configuration); one bmm per matrix shape folds I + U into A.

    Args:
        contract: names, shapes, ranks and scale.
        encoder: tables of the configuration's features.
        preset: form of θ; "none": no θ, U = 0 for every configuration.
        seed: of the start values: A normal with variance 1/K (unit gain), B zero.
    """

    def __init__(
        self, contract: LoraContract, encoder: ConfigEncoder, preset: Preset = "coatrt", seed: int = 0
    ) -> None:
        super().__init__()
        self.contract = contract
        self.encoder = encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.theta = (
                Hypernetwork(HypernetworkOptions(preset, contract.rank, encoder.layers, len(encoder.module_kinds)))
                if preset != "none"
                else None
            )
            shapes: dict[tuple[int, int, int], list[int]] = {}
            for i, tensor in enumerate(contract.tensors):
                shapes.setdefault((tensor.K, tensor.N, tensor.rank), []).append(i)
            self._members = tuple(shapes.values())
            self.A = nn.ParameterList(torch.randn(len(rows), K, r) / K**0.5 for (K, _, r), rows in shapes.items())
            self.B = nn.ParameterList(torch.zeros(len(rows), r, N) for (_, N, r), rows in shapes.items())

    def stacks(self) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield (places in the contract, A [m, K, r], B [m, r, N]) for every distinct matrix shape."""
        yield from zip(self._members, self.A, self.B, strict=True)

    @property
    def preset(self) -> Preset:
        """Form of θ."""
        return self.theta.options.preset if self.theta is not None else "none"

    def rates(self, options: TrainOptions) -> list[tuple[list[nn.Parameter], float]]:
        """Return A and B, then θ, with their peak learning rates."""
        theta = list(self.theta.parameters()) if self.theta is not None else []
        return [([*self.A, *self.B], options.learning_rate), (theta, options.theta_rate)][: 1 + bool(theta)]

    def pairs(self, config: QuantConfig) -> dict[str, tuple[Tensor, Tensor]]:
        """Return matrix name → (A' [K, r], s·B [r, N]) for a configuration."""
        return self(self.encoder.format_ids(config))  # type: ignore[no-any-return]

    def forward(self, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return matrix name → (A' [K, r], s·B [r, N]) for a configuration.

        Args:
            ids: int64 [M], see `ConfigEncoder.format_ids`.
        """
        device, updates = self.A[0].device, None
        if self.theta is not None:
            updates = self.theta(self.encoder.indices(ids).to(device), self.encoder.features(ids).to(device))
        result: dict[str, tuple[Tensor, Tensor]] = {}
        for rows, A, B in self.stacks():
            r = A.shape[-1]
            folded = A if updates is None else torch.baddbmm(A, A, updates[rows, :r, :r].transpose(1, 2))
            scaled = B * self.contract.scale(self.contract.tensors[rows[0]])
            for row, a, b in zip(rows, folded.unbind(0), scaled.unbind(0), strict=True):
                result[self.contract.tensors[row].matrix] = (a, b)
        return result

    @torch.no_grad()
    def emit(self, ids: Tensor) -> dict[str, Tensor]:
        """Return every tensor of the contract for a configuration, float32, in contract order."""
        pairs = self(ids)
        result = {}
        for tensor in self.contract.tensors:
            a, b = pairs[tensor.matrix]
            result[tensor.A], result[tensor.B] = a.detach().cpu().clone(), b.detach().cpu().clone()
        return result

    def shared(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return matrix name → (A [K, r], B [r, N]) as trained: no U, B not scaled."""
        return {
            self.contract.tensors[row].matrix: (A[i].detach(), B[i].detach())
            for rows, A, B in self.stacks()
            for i, row in enumerate(rows)
        }

    def load_shared(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Set A and B from `pairs`, the inverse of `shared`."""
        with torch.no_grad():
            for rows, A, B in self.stacks():
                for i, row in enumerate(rows):
                    a, b = pairs[self.contract.tensors[row].matrix]
                    A[i].copy_(a)
                    B[i].copy_(b)
