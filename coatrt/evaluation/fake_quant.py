"""A transformers model with frozen weights in any configuration, and a LoRA beside them."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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

_RESERVE = 1 / 8  # share of a GPU's memory kept free of decoded weights


def _default_limit(device: torch.device) -> int:
    """Return the default limit in bytes of cached decoded weights."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return 4 << 30 if device.type == "cpu" else 0


def _is_memory_low(device: torch.device) -> bool:
    """Return whether a GPU has too little free memory for more decoded weights."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return free < _RESERVE * total


class _AdaptedLinear(nn.Module):
    """A frozen linear layer plus its LoRA pair (A [K, r], B [r, N]), if it has one.

    Args:
        linear: the layer.
        name: name of its matrix.
        pairs: pairs of all matrices, shared by all layers and changed in place.
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
    """One base model in memory; setting a configuration replaces only the weights whose format changes.

    Args:
        checkpoint: the model, of a family that `DecoderSpec` knows.
        codes: its encoded matrices.
        compute: torch device of the model, such as "cpu" or "cuda".
        decoded_bytes: maximum bytes of decoded weights cached for later configurations, the least recently used dropped
            first; by default 4 GiB on the CPU, and half of a GPU's free memory after loading the model. Once less than
            an eighth of a GPU's memory is free, the cache stops growing.
        dtype: dtype of the weights and of all products, including the LoRA's; LoRA tensors may have another.

    Raises:
        CheckpointError: transformers cannot load it, or does not tie the head.
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
        self._limit = decoded_bytes if decoded_bytes is not None else _default_limit(self.compute)
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
            raise CheckpointError(
                f"{checkpoint.directory} has a tied head that transformers does not tie; download the model again"
            )

    @torch.no_grad()
    def set_config(self, config: QuantConfig | None) -> None:
        """Set the weights to those of a configuration; None: the checkpoint's."""
        for name, weight in self._weights.items():
            text = str(config[name]) if config is not None else ""
            if text != self._current[name]:
                weight.data = self._decode(name, text, self.dtype)
                self._current[name] = text

    @torch.no_grad()
    def weight(self, name: str, fmt: WeightFormat | None, exact: bool = True) -> Tensor:
        """Return a matrix [N, K] decoded from a format, read-only; None: the checkpoint's.

        Its dtype is float32 if `exact`, else the model's, which avoids decoding the weights in use again.
        """
        text = str(fmt) if fmt is not None else ""
        dtype = torch.float32 if exact else self.dtype
        now = self._weights[name]
        if self._current[name] == text and now.dtype == dtype:
            return now.detach()
        return self._decode(name, text, dtype)

    def _decode(self, name: str, text: str, dtype: torch.dtype) -> Tensor:
        """Return the weight of a matrix in a format ("": the checkpoint's), cached."""
        key = (name, text, dtype)
        if key in self._decoded:
            self._decoded.move_to_end(key)
            return self._decoded[key]
        if text:
            value = decode(self._codes.get(name, text).to(self.compute)).to(dtype)
        else:
            value = self.checkpoint.tensor(f"{name}.weight").to(self.compute, dtype)
        if _is_memory_low(self.compute):
            self._limit = min(self._limit, self._bytes)
        if value.nbytes <= self._limit:
            self._decoded[key] = value
            self._bytes += value.nbytes
            while self._bytes > self._limit:
                self._bytes -= self._decoded.popitem(last=False)[1].nbytes
        return value

    def set_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Set matrices [N, K] to other values until the next `set_config`."""
        for name, weight in weights:
            self._weights[name].data = weight.to(self.compute, self.dtype)
            self._current[name] = "given"

    @contextmanager
    def weight_gradients(self, names: Iterable[str], visit: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Call `visit(name, gradient [N, K])` for the weights of matrices in every backward pass inside the context.

        One gradient at a time is in memory.
        """

        def hook(name: str) -> Callable[[Tensor], None]:
            def take(weight: Tensor) -> None:
                assert weight.grad is not None
                with torch.no_grad():
                    visit(name, weight.grad)
                weight.grad = None

            return take

        weights = {name: self._weights[name] for name in names}
        hooks = [
            weight.requires_grad_().register_post_accumulate_grad_hook(hook(name))  # type: ignore[no-untyped-call]
            for name, weight in weights.items()
        ]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()
            for weight in weights.values():
                weight.requires_grad_(False)

    def forget(self) -> None:
        """Set full precision and drop all decoded weights: the encoded matrices have changed."""
        self.set_config(None)
        self._decoded.clear()
        self._bytes = 0

    def set_pairs(self, pairs: Mapping[str, tuple[Tensor, Tensor]] | None) -> None:
        """Set the LoRA pairs: matrix → (A [K, r], scaled B [r, N]); matrices without a pair have no LoRA."""
        self._pairs.clear()
        self._pairs.update(pairs or {})

    def set_lora(self, contract: LoraContract, tensors: Mapping[str, Tensor] | None) -> None:
        """Set the LoRA from tensors by their contract names; None removes it."""
        pairs = {}
        if tensors is not None:
            for t in contract.tensors:
                pairs[t.matrix] = tensors[t.A].to(self.compute), tensors[t.B].to(self.compute)
        self.set_pairs(pairs)

    def logits(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """Return logits [B, S, V] of token ids int64 [B, S]; with `places`, int64 columns [P], only [B, P, V]."""
        keep = {} if places is None else {"logits_to_keep": to_device(places, self.compute)}
        result: Tensor = self.model(input_ids=to_device(tokens, self.compute), use_cache=False, **keep).logits
        return result

    def predictions(self, batch: Examples) -> tuple[Tensor, Tensor]:
        """Return logits float32 [T, V] and tokens int64 [T] of all T targets of a batch, row by row.

        The targets are selected on the CPU, where the batch is, without waiting for a GPU.
        """
        examples = batch.trimmed()
        targets = examples.targets[:, 1:]
        is_target = targets != IGNORED
        places = is_target.any(0).nonzero().squeeze(1)
        every = len(places) == targets.shape[1]
        logits = self.logits(examples.tokens[:, :-1], None if every else places).flatten(0, 1)
        targets_at = is_target[:, places].flatten().nonzero().squeeze(1)
        if len(targets_at) < len(logits):  # a copy of the logits, not needed for plain text
            logits = logits.index_select(0, to_device(targets_at, self.compute))
        return logits.float(), to_device(targets[is_target], self.compute)

    def loss(self, batch: Examples) -> Tensor:
        """Return the mean cross-entropy in nats over the targets of a batch."""
        return nn.functional.cross_entropy(*self.predictions(batch))
