"""A decoder run layer by layer on calibration tokens: in full precision, and beside it as quantized so far."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor

__all__ = ["LayerStreams"]

_BATCH = 4  # blocks of tokens in one forward pass
_ADDITIVE = 1e-3  # relative difference up to which a layer's output is the sum of its input and these outputs
_ADDED = ("o_proj", "down_proj")  # matrices whose outputs a layer adds to the residual stream
_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Found(Exception):
    pass


class LayerStreams:
    """The hidden states before the current layer, of a model in full precision and as quantized so far.

    Memory: both hidden states of all tokens, float32 [T, H], on the model's device.

    Args:
        model: a transformers model in full precision; weights of the current layer are exchanged while it runs.
        tokens: int64 [blocks, length].
    """

    @torch.no_grad()
    def __init__(self, model: Any, tokens: Tensor) -> None:
        decoder = model.get_decoder()
        self.tokens = tokens.numel()
        self._layers = list(decoder.layers)
        batches = [part.to(model.device) for part in tokens.split(_BATCH)]
        self._calls: list[dict[int, _Call]] = [{} for _ in self._layers]
        with ExitStack() as hooks:  # masks and positions: the same for all batches of a size
            for layer, calls in zip(self._layers, self._calls, strict=True):
                hooks.enter_context(layer.register_forward_pre_hook(_keep_call(calls), with_kwargs=True))
            for rows in {len(part): part for part in batches}.values():
                decoder(input_ids=rows, use_cache=False)
        self._exact = [_first_hidden(decoder, rows) for rows in batches]
        self._quantized = list(self._exact)
        self._place = 0
        self._weights: dict[str, tuple[Tensor, Tensor]] = {}
        self._is_additive = self._check_sum()

    @property
    def place(self) -> int:
        """Index of the current layer."""
        return self._place

    def set_weight(self, name: str, weight: Tensor) -> None:
        """Set the quantized weight [N, K] of a matrix of the current layer, by its name within the layer."""
        module = self._layers[self._place].get_submodule(name)
        self._weights[name] = (module.weight.data, weight.to(module.weight.device, module.weight.dtype))

    @torch.no_grad()
    def inputs(self, name: str) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield (x, x̃, d) of a matrix of the current layer, batch by batch: float32 [T, K], [T, K] and [T, N].

        x is its input in full precision and x̃ as quantized so far. d is the residual stream that its output is added
        to, in full precision less as quantized so far; None if its output is not added to the residual stream as it is.

        Args:
            name: its name within the layer.
        """
        for exact, quantized in zip(self._exact, self._quantized, strict=True):
            x, before = self._visit(name, exact)
            with _exchanged(self._layers[self._place], self._weights):
                near, near_before = self._visit(name, quantized)
            is_added = self._is_additive and name.rpartition(".")[2] in _ADDED
            yield x, near, (before - near_before).flatten(0, -2).float() if is_added else None

    @torch.no_grad()
    def advance(self) -> None:
        """Go on to the next layer."""
        for i, (exact, quantized) in enumerate(zip(self._exact, self._quantized, strict=True)):
            self._exact[i] = self._run(exact)
            with _exchanged(self._layers[self._place], self._weights):
                self._quantized[i] = self._run(quantized)
        self._weights.clear()
        self._place += 1
        if self._place < len(self._layers):
            self._is_additive = self._check_sum()

    def _run(self, hidden: Tensor) -> Tensor:
        positional, named = self._calls[self._place][len(hidden)]
        out = self._layers[self._place](hidden, *positional, **named)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def _visit(self, name: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return a matrix's input [T, K] and the sum of `hidden` and the outputs added before it."""
        layer, found, total = self._layers[self._place], [], [hidden]

        def stop(_: Any, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0].flatten(0, -2).float())
            raise _Found

        with self._adding(total), layer.get_submodule(name).register_forward_pre_hook(stop), suppress(_Found):
            self._run(hidden)
        return found[0], torch.stack(total).sum(0) if len(total) > 1 else hidden

    def _adding(self, total: list[Tensor]) -> ExitStack:
        """Return a context in which the outputs of the matrices that write to the residual stream join a list."""
        hooks = ExitStack()
        for name, module in self._layers[self._place].named_modules():
            if name.rpartition(".")[2] in _ADDED:
                hooks.enter_context(module.register_forward_hook(lambda _, __, output: total.append(output)))
        return hooks

    def _check_sum(self) -> bool:
        """Return whether the layer's output is the sum of its input and the outputs written to the residual stream."""
        hidden = self._exact[0]
        total = [hidden]
        with self._adding(total):
            out = self._run(hidden)
        if len(total) == 1 or any(part.shape != hidden.shape for part in total):
            return False
        return bool((out - torch.stack(total).sum(0)).norm() <= _ADDITIVE * (out - hidden).norm())


def _keep_call(calls: dict[int, _Call]) -> Callable[..., None]:
    def hook(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = positional[0] if positional else named["hidden_states"]
        calls[len(hidden)] = positional[1:], {key: value for key, value in named.items() if key != "hidden_states"}

    return hook


def _first_hidden(decoder: Any, rows: Tensor) -> Tensor:
    """Return the hidden states before the first layer."""
    found: list[Tensor] = []

    def stop(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(positional[0] if positional else named["hidden_states"])
        raise _Found

    with decoder.layers[0].register_forward_pre_hook(stop, with_kwargs=True), suppress(_Found):
        decoder(input_ids=rows, use_cache=False)
    return found[0]


class _exchanged:
    """Puts quantized weights into a layer, and the exact ones back."""

    def __init__(self, layer: Any, weights: dict[str, tuple[Tensor, Tensor]]) -> None:
        self._layer, self._weights = layer, weights

    def __enter__(self) -> None:
        for name, (_, quantized) in self._weights.items():
            self._layer.get_submodule(name).weight.data = quantized

    def __exit__(self, *_: object) -> None:
        for name, (exact, _) in self._weights.items():
            self._layer.get_submodule(name).weight.data = exact
