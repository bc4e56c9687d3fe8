"""The caches of several sequences, each in a row: a row is extended by its prompt, rows are decoded together.

A row must not depend on the others. ONNX Runtime's products compute one row with another kernel than several, and the
last of an odd number with another than its neighbours; those round differently. So every call has an even number of
rows or tokens, and one thread computes all of it: then logits are equal bit for bit, whatever runs beside them.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from coatrt.configs.lora_contract import DecoderIO, LoraContract
from coatrt.engines.runtime.decoder import CachedDecoder, LoraTensors, check_lora

__all__ = ["DecoderRows", "OrtRows", "Rows", "RowsLora"]

_MOST_BINDINGS = 64


class RowsLora:
    """A LoRA to run rows with.

    Args:
        contract: its tensors' names and shapes; None for a graph without LoRA.
        tensors: None for none, which runs the quantized weights alone.
        dtype: of the graph's activations.
    """

    def __init__(self, contract: LoraContract | None, tensors: LoraTensors | None, dtype: "np.dtype[Any]") -> None:
        if tensors is not None:
            check_lora(contract, tensors)
        self.tensors = tensors
        zeros = {} if contract is None else {n: np.zeros(s, dtype) for n, s in contract.inputs.items()}
        inputs = zeros if tensors is None or contract is None else contract.graph_inputs(tensors, dtype)
        self.values = {n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for n, v in inputs.items()}


class Rows(Protocol):
    """Rows of caches. `lengths` are the filled positions of each; they may be lowered, to drop the rest of a row."""

    lengths: NDArray[np.int64]

    @property
    def capacity(self) -> int:
        """Largest number of positions of a row."""

    def extend(self, row: int, tokens: Sequence[int], lora: RowsLora) -> NDArray[np.float32]:
        """Append tokens to a row and return the logits after them, [V]."""

    def step(self, tokens: Mapping[int, int], lora: RowsLora) -> dict[int, NDArray[np.float32]]:
        """Append one token to each of some rows; return row → the logits after it, [V]."""

    def copy(self, source: int, row: int, count: int) -> bool:
        """Fill a row with the first positions of another; return whether that is possible."""


class OrtRows:
    """Rows in ONNX Runtime on the CPU; a call sees the part of the caches with its rows.

    Args:
        session: of the cpu form of a graph; several `OrtRows` may share it.
        io: its inputs and outputs.
        rows: number of rows.
        capacity: positions of each.
    """

    def __init__(self, session: Any, io: DecoderIO, rows: int, capacity: int) -> None:
        self.capacity, self._session, self._io = capacity, session, io
        self._rows = rows + rows % 2
        self.lengths = np.zeros(self._rows, np.int64)
        # One slot more than positions: rows that have nothing to compute write there, or beyond what is filled.
        shape = (self._rows, io.kv_heads, capacity + 1, io.head_dim)
        self._caches = [np.zeros(shape, np.dtype(io.activations)) for _ in io.past_names]
        self._bindings: OrderedDict[tuple[int, int, RowsLora], Any] = OrderedDict()

    def extend(self, row: int, tokens: Sequence[int], lora: RowsLora) -> NDArray[np.float32]:
        """Append tokens to a row and return the logits after them, float32 [V]."""
        count = len(tokens)
        ids = np.zeros((1, count + count % 2), np.int64)
        ids[0, :count] = tokens
        logits = self._run(row, row + 1, ids, lora, np.full((1, 2), count - 1, np.int64))
        self.lengths[row] += count
        after: NDArray[np.float32] = logits[0, 0]
        return after

    def step(self, tokens: Mapping[int, int], lora: RowsLora) -> dict[int, NDArray[np.float32]]:
        """Append one token to each of some rows; return row → the logits after it, float32 [V]."""
        first, end = min(tokens), max(tokens) + 1
        if (end - first) % 2:
            first, end = (first, end + 1) if end < self._rows else (first - 1, end)
        ids = np.zeros((end - first, 1), np.int64)
        for row, token in tokens.items():
            ids[row - first] = token
        logits = self._run(first, end, ids, lora, np.zeros((end - first, 1), np.int64))
        for row in tokens:
            self.lengths[row] += 1
        return {row: logits[row - first, 0] for row in tokens}

    def copy(self, source: int, row: int, count: int) -> bool:
        """Fill a row with the first positions of another."""
        for cache in self._caches:
            cache[row, :, :count] = cache[source, :, :count]
        self.lengths[row] = count
        return True

    def _run(
        self, first: int, end: int, ids: NDArray[np.int64], lora: RowsLora, index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        binding, starts = self._binding(first, end, lora), self.lengths[first:end].copy()
        positions = np.minimum(starts[:, None] + np.arange(ids.shape[1]), self._io.max_positions - 1)
        inputs = {"input_ids": ids, "position_ids": positions, "write_index": starts, "logits_index": index}
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        return np.asarray(binding.get_outputs()[-1].numpy(), np.float32)

    def _binding(self, first: int, end: int, lora: RowsLora) -> Any:
        """Return the binding of the caches of some rows and a LoRA, which few calls make and many use."""
        key = first, end, lora
        if key in self._bindings:
            self._bindings.move_to_end(key)
            return self._bindings[key]
        while len(self._bindings) >= _MOST_BINDINGS:
            self._bindings.popitem(last=False)
        binding = self._session.io_binding()
        for name, value in lora.values.items():
            binding.bind_ortvalue_input(name, value)
        for past, present, cache in zip(self._io.past_names, self._io.present_names, self._caches, strict=True):
            part = cache[first:end]
            place = "cpu", 0, cache.dtype.type, list(part.shape), part.ctypes.data
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)
        self._bindings[key] = binding
        return binding


class DecoderRows:
    """Rows that are decoders of one sequence each, which take turns: for GPUs.

    Args:
        decoders: one for each row.
    """

    def __init__(self, decoders: Sequence[CachedDecoder]) -> None:
        self._decoders = list(decoders)
        self._loras: list[RowsLora | None] = [None] * len(self._decoders)
        self.capacity = min(decoder.capacity for decoder in self._decoders)
        self.lengths = np.zeros(len(self._decoders), np.int64)

    def extend(self, row: int, tokens: Sequence[int], lora: RowsLora) -> NDArray[np.float32]:
        """Append tokens to a row and return the logits after them, float32 [V]."""
        decoder = self._decoders[row]
        if self._loras[row] is not lora:
            decoder.set_lora(lora.tensors)
            self._loras[row] = lora
        chunk = decoder.chunk or len(tokens)
        for begin in range(0, len(tokens), chunk):
            part = np.array([tokens[begin : begin + chunk]], np.int64)
            logits = decoder.run(part, self.lengths[row : row + 1].copy(), np.array([[part.shape[1] - 1]]))
            self.lengths[row] += part.shape[1]
        return np.array(logits[0, 0], np.float32)

    def step(self, tokens: Mapping[int, int], lora: RowsLora) -> dict[int, NDArray[np.float32]]:
        """Append one token to each of some rows; return row → the logits after it, float32 [V]."""
        return {row: self.extend(row, [token], lora) for row, token in tokens.items()}

    def copy(self, source: int, row: int, count: int) -> bool:
        """Return False: the caches are on the GPU."""
        return False
