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
from coatrt.system.tensors import to_device

__all__ = ["FakeQuantModel"]

_LEFT_FREE = 1 / 8  # of a GPU's memory, beside decoded weights


def _most_decoded(device: torch.device) -> int:
    """Return how many bytes of decoded weights are kept unless something else is said."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return 4 << 30 if device.type == "cpu" else 0


def _short_of_memory(device: torch.device) -> bool:
    """Return whether a GPU has too little memory left for more decoded weights."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return free < _LEFT_FREE * total


class _AdaptedLinear(nn.Module):
    """A frozen linear layer plus its pair (A [K, r], B [r, N]), if there is one.

    Args:
        linear: the layer.
        name: of its matrix.
        pairs: of all matrices; whoever binds others changes it.
    """

    def __init__(self, linear: nn.Linear, name: str, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self._name, self._pairs = name, pairs

    def forward(self, x: Tensor) -> Tensor:
        pair = self._pairs.get(self._name)
        if pair is None:
            return nn.functional.linear(x, self.weight, self.bias)
        A, B = pair
        rows = x.reshape(-1, x.shape[-1])
        out = nn.functional.linear(rows, self.weight, self.bias)
        out.addmm_(rows @ A.to(x.dtype), B.to(x.dtype))
        return out.view(*x.shape[:-1], -1)


class FakeQuantModel:
    """One base model in memory; a configuration exchanges the weights that it changes, no others.

    Args:
        checkpoint: the model, of a family that `DecoderSpec` knows.
        codes: cache of its encoded matrices.
        compute: torch device that holds the model ("cpu", "cuda").
        decoded_bytes: most bytes of decoded weights kept for the next configuration that wants them, the least recently
            used going first; by default 4 GiB on the CPU and half of the memory that a GPU has free beside the model.
            Once less than an eighth of a GPU's memory is free it keeps no more bytes than it does then.
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
        self._limit = decoded_bytes if decoded_bytes is not None else _most_decoded(self.compute)
        self._decoded: OrderedDict[tuple[str, str, torch.dtype], Tensor] = OrderedDict()
        self._bytes = 0
        self._weights: dict[str, Tensor] = {}
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self._current: dict[str, str] = dict.fromkeys(checkpoint.matrices.names, "")
        for matrix in checkpoint.matrices.matrices:
            module = self.model.get_submodule(matrix.name)
            self._weights[matrix.name] = module.weight
            if not matrix.is_table:
                self.model.set_submodule(matrix.name, _AdaptedLinear(module, matrix.name, self._pairs))
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
        if _short_of_memory(self.compute):
            self._limit = min(self._limit, self._bytes)
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
        self._pairs.clear()
        self._pairs.update(pairs or {})

    def set_lora(self, contract: LoraContract, tensors: Mapping[str, Tensor] | None) -> None:
        """Bind emitted LoRA tensors by their contract names; None takes the LoRA away."""
        pairs = {}
        if tensors is not None:
            for t in contract.tensors:
                pairs[t.matrix] = tensors[t.A].to(self.compute), tensors[t.B].to(self.compute)
        self.set_pairs(pairs)

    def logits(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """Return logits [B, S, V] of token ids int64 [B, S], or [B, P, V] at some places only, int64 columns [P]."""
        keep = {} if places is None else {"logits_to_keep": to_device(places, self.compute)}
        result: Tensor = self.model(input_ids=to_device(tokens, self.compute), use_cache=False, **keep).logits
        return result

    def predictions(self, batch: Examples) -> tuple[Tensor, Tensor]:
        """Return logits float32 [T, V] and tokens int64 [T] of the T targets of a batch, row by row.

        Which these are is decided on the CPU, where the batch is: no GPU is waited for.
        """
        examples = batch.trimmed()
        targets = examples.targets[:, 1:]
        marked = targets != IGNORED
        places = marked.any(0).nonzero().squeeze(1)
        every = len(places) == targets.shape[1]
        logits = self.logits(examples.tokens[:, :-1], None if every else places).flatten(0, 1)
        chosen = marked[:, places].flatten().nonzero().squeeze(1)
        if len(chosen) < len(logits):  # a copy of the logits that plain text does without
            logits = logits.index_select(0, to_device(chosen, self.compute))
        return logits.float(), to_device(targets[marked], self.compute)

    def loss(self, batch: Examples) -> Tensor:
        """Return the mean cross-entropy in nats over the targets of a batch."""
        return nn.functional.cross_entropy(*self.predictions(batch))
