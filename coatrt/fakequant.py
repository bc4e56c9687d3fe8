"""A transformers model whose frozen weights stand for any configuration, with a LoRA beside them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coatrt.checkpoint import Checkpoint, load_model
from coatrt.config import QuantConfig
from coatrt.contract import LoraContract
from coatrt.errors import CheckpointError
from coatrt.matrices import EMBEDDING
from coatrt.quantize import decode
from coatrt.store import CodeStore

__all__ = ["FakeQuantModel"]


class _AdaptedLinear(nn.Module):
    """A frozen linear layer plus an optional pair (A [K, r], B [r, N])."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.pair: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.linear(x, self.weight, self.bias)
        if self.pair is not None:
            out = out + (x @ self.pair[0]) @ self.pair[1]
        return out


class FakeQuantModel:
    """One base model in memory; a configuration overwrites the weights that it changes, no others.

    Args:
        checkpoint: the model.
        codes: cache of its encoded matrices.
        compute: torch device that holds the model ("cpu", "cuda").

    Raises:
        CheckpointError: transformers cannot load it, or its modules are not linear layers.
    """

    def __init__(self, checkpoint: Checkpoint, codes: CodeStore, compute: str = "cpu") -> None:
        self.checkpoint = checkpoint
        self.model: Any = load_model(checkpoint).to(compute).requires_grad_(False)
        self.compute = torch.device(compute)
        self._codes = codes
        self._weights: dict[str, Tensor] = {}
        self._adapted: dict[str, _AdaptedLinear] = {}
        self._current: dict[str, str] = dict.fromkeys(checkpoint.matrices.names, "")
        for matrix in checkpoint.matrices.matrices:
            module = self.model.get_submodule(matrix.name)
            if matrix.is_table:
                self._weights[matrix.name] = module.weight
                continue
            if not isinstance(module, nn.Linear):
                raise CheckpointError(f"{matrix.name} is a {type(module).__name__}; coatrt adapts plain linear layers")
            adapted = _AdaptedLinear(module)
            self.model.set_submodule(matrix.name, adapted)
            self._adapted[matrix.name], self._weights[matrix.name] = adapted, adapted.weight
        if checkpoint.matrices.tied and self.model.lm_head.weight is not self._weights[EMBEDDING]:
            raise CheckpointError(f"{checkpoint.directory} says its head is tied, and it is not; fetch the model again")

    @torch.no_grad()
    def set_config(self, config: QuantConfig | None) -> None:
        """Make the weights those of a configuration; None: the checkpoint's own."""
        for name, weight in self._weights.items():
            wanted = str(config[name]) if config is not None else ""
            if wanted == self._current[name]:
                continue
            if config is None:
                weight.copy_(self.checkpoint.tensor(f"{name}.weight"))
            else:
                weight.copy_(decode(self._codes.get(name, config[name]).to(self.compute)))
            self._current[name] = wanted

    @torch.no_grad()
    def set_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite matrices with weights [N, K] from elsewhere, until `set_config` gives them a format again."""
        for name, weight in weights:
            self._weights[name].copy_(weight)
            self._current[name] = "given"

    def set_pairs(self, pairs: Mapping[str, tuple[Tensor, Tensor]] | None) -> None:
        """Put (A [K, r], scaled B [r, N]) beside each matrix named; None or a name left out: nothing."""
        for name, module in self._adapted.items():
            module.pair = pairs.get(name) if pairs is not None else None

    def set_lora(self, contract: LoraContract, tensors: Mapping[str, Tensor] | None) -> None:
        """Bind emitted LoRA tensors by their contract names; None takes the LoRA away."""
        if tensors is None:
            self.set_pairs(None)
            return
        self.set_pairs({
            t.matrix: (tensors[t.A].to(self.compute), tensors[t.B].to(self.compute)) for t in contract.tensors
        })  # fmt: skip

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits [B, S, V] of token ids [B, S]."""
        result: Tensor = self.model(input_ids=tokens.to(self.compute), use_cache=False).logits
        return result

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the mean next-token cross-entropy in nats over all but the first of token ids [B, S]."""
        logits = self.logits(tokens)[:, :-1]
        targets = tokens[:, 1:].to(self.compute)
        return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1))
