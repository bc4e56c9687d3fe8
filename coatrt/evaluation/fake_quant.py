"""A transformers model whose frozen weights stand for any configuration, with a LoRA beside them."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import LoraContract
from coatrt.data.examples import IGNORED, Examples
from coatrt.errors import CheckpointError
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.matrices import EMBEDDING
from coatrt.models.modules import load_model
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode
from coatrt.quantization.weight_format import WeightFormat

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
            A, B = self.pair
            out = out + (x @ A.to(x.dtype)) @ B.to(x.dtype)
        return out


class FakeQuantModel:
    """One base model in memory; a configuration exchanges the weights that it changes, no others.

    Args:
        checkpoint: the model, of a family that `DecoderSpec` knows.
        codes: cache of its encoded matrices.
        compute: torch device that holds the model ("cpu", "cuda").
        decoded_bytes: most bytes of decoded weights kept for the next configuration that wants them, the least recently
            used going first; by default 4 GiB on the CPU and none on a GPU, which decodes fast and has little memory.
        dtype: of the weights and of all products, those of the LoRA among them; its tensors may have another.

    Raises:
        CheckpointError: transformers cannot load it, or does not tie a head that is tied.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        codes: CodeStore,
        compute: str = "cpu",
        decoded_bytes: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.model: Any = load_model(checkpoint, dtype).to(compute).requires_grad_(False)
        self.compute = torch.device(compute)
        self._codes = codes
        self._limit = decoded_bytes if decoded_bytes is not None else (4 << 30) * (self.compute.type == "cpu")
        self._decoded: OrderedDict[tuple[str, str, torch.dtype], Tensor] = OrderedDict()
        self._bytes = 0
        self._weights: dict[str, Tensor] = {}
        self._adapted: dict[str, _AdaptedLinear] = {}
        self._current: dict[str, str] = dict.fromkeys(checkpoint.matrices.names, "")
        for matrix in checkpoint.matrices.matrices:
            module = self.model.get_submodule(matrix.name)
            if matrix.is_table:
                self._weights[matrix.name] = module.weight
                continue
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
            if wanted != self._current[name]:
                weight.data = self._decode(name, wanted, self.dtype)
                self._current[name] = wanted

    @torch.no_grad()
    def weight(self, name: str, fmt: WeightFormat | None, exact: bool = True) -> Tensor:
        """Return a matrix [N, K] as a format leaves it (None: the checkpoint's own); it is not to be written to.

        It is float32 if `exact`, whatever dtype the model has; else the model's, which saves decoding what is in use.
        """
        text = str(fmt) if fmt is not None else ""
        dtype = torch.float32 if exact else self.dtype
        now = self._weights[name]
        if self._current[name] == text and now.dtype == dtype:
            return now.detach()
        return self._decode(name, text, dtype)

    def _decode(self, name: str, text: str, dtype: torch.dtype) -> Tensor:
        """Return the weight of a matrix in a format ("": the checkpoint's own), kept for the next time."""
        key = (name, text, dtype)
        if key in self._decoded:
            self._decoded.move_to_end(key)
            return self._decoded[key]
        if text:
            value = decode(self._codes.get(name, text).to(self.compute)).to(dtype)
        else:
            value = self.checkpoint.tensor(f"{name}.weight").to(self.compute, dtype)
        if value.nbytes <= self._limit:
            self._decoded[key] = value
            self._bytes += value.nbytes
            while self._bytes > self._limit:
                self._bytes -= self._decoded.popitem(last=False)[1].nbytes
        return value

    def set_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take matrices [N, K] from elsewhere, until `set_config` gives them a format again."""
        for name, weight in weights:
            self._weights[name].data = weight.to(self.compute, self.dtype)
            self._current[name] = "given"

    def set_pairs(self, pairs: Mapping[str, tuple[Tensor, Tensor]] | None) -> None:
        """Put (A [K, r], scaled B [r, N]) beside each matrix named; None or a name left out: nothing."""
        for name, module in self._adapted.items():
            module.pair = pairs.get(name) if pairs is not None else None

    def set_lora(self, contract: LoraContract, tensors: Mapping[str, Tensor] | None) -> None:
        """Bind emitted LoRA tensors by their contract names; None takes the LoRA away."""
        pairs = {}
        if tensors is not None:
            for t in contract.tensors:
                pairs[t.matrix] = tensors[t.A].to(self.compute), tensors[t.B].to(self.compute)
        self.set_pairs(pairs)

    def logits(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """Return logits [B, S, V] of token ids int64 [B, S], or [B, P, V] at some places only, int64 columns [P]."""
        keep = {} if places is None else {"logits_to_keep": places.to(self.compute)}
        result: Tensor = self.model(input_ids=tokens.to(self.compute), use_cache=False, **keep).logits
        return result

    def predictions(self, batch: Examples) -> tuple[Tensor, Tensor]:
        """Return logits [B, P, V] and targets int64 [B, P] at the P places where some row has a target."""
        examples = batch.trimmed()
        targets = examples.targets[:, 1:]
        places = (targets != IGNORED).any(0).nonzero().squeeze(1)
        if len(places) == targets.shape[1]:
            return self.logits(examples.tokens)[:, :-1], targets.to(self.compute)
        return self.logits(examples.tokens[:, :-1], places), targets[:, places].to(self.compute)

    def loss(self, batch: Examples) -> Tensor:
        """Return the mean cross-entropy in nats over the targets of a batch."""
        logits, targets = self.predictions(batch)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)
