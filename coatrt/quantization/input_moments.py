"""Calibration: tokens, and the second moments H = E[x xᵀ] of the inputs of every linear matrix on them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coatrt.data.documents import batches
from coatrt.data.examples import Examples
from coatrt.errors import CheckpointError, ConfigError
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.matrices import EMBEDDING, HEAD, ModelMatrices
from coatrt.models.modules import load_model
from coatrt.quantization.float32 import full_float32
from coatrt.system.disk import cache_directory, cache_writing
from coatrt.system.progress import Progress, silent
from coatrt.system.resources import free_device_memory, free_memory
from coatrt.system.scratch import sweep
from coatrt.system.tensors import hash_tensors, read_tensors, write_tensors

__all__ = ["Calibration", "InputMoments", "calibration_examples", "measure_moments", "required_tokens", "visit_inputs"]

_KEY = "tokens"
_TOKENS_PER_INPUT = 4
_BATCH = 4  # blocks in one forward pass
_MIN_BYTES = 1 << 30  # bytes of moments measured at once in any case


@dataclass(frozen=True, eq=False)
class Calibration:
    """The calibration tokens of a model.

    Args:
        tokens: int64 [blocks, length], at least one.
    """

    tokens: Tensor

    @classmethod
    def of(cls, examples: Examples) -> "Calibration":
        """Return the tokens of examples without padding, concatenated and cut into rows of their width."""
        width = examples.tokens.shape[1]
        is_used = torch.arange(width) <= examples.last[:, None]
        if bool(is_used.all()):
            return cls(examples.tokens)
        stream = examples.tokens[is_used]
        return cls(stream[: max(1, len(stream) // width) * width].view(-1, min(width, len(stream))))

    @cached_property
    def hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 over shape and tokens."""
        return hash_tensors({_KEY: self.tokens})[:16]

    def save(self, path: Path) -> None:
        """Write the tokens as safetensors, atomically."""
        write_tensors(path, {_KEY: self.tokens})

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read the tokens from a file of `save`.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        content = read_tensors(path)
        if content is None or _KEY not in content[0]:
            raise CheckpointError(f"{path} is missing or damaged; copy it again")
        return cls(content[0][_KEY])


def calibration_examples(train: Examples, count: int, length: int, seed: int, others: bool = False) -> Examples:
    """Return the examples to calibrate on: `count` of them, or more short ones with count · length tokens in all.

    Args:
        train: examples to choose from; all of them if they are fewer.
        count: minimum number of examples.
        length: tokens of a full example.
        seed: seed of the order.
        others: whether to take them from the end of the order: examples not calibrated on, if there are enough.
    """
    order = batches(len(train), len(train), 0, seed)
    if others:
        order = order.flip(0)
    tokens = (train.last[order] + 1).cumsum(0)
    enough = int((tokens < count * length).sum()) + 1
    return train[order[: max(count, enough)]]


def required_tokens(model: ModelMatrices) -> int:
    """Return the number of calibration tokens that error feedback needs: four per input of the widest matrix.

    With fewer tokens the quantization error grows (`benchmarks/calibration_size.py`, docs/evidence/quantizers.md).
    """
    return _TOKENS_PER_INPUT * max(matrix.K for matrix in model.targets)


@torch.no_grad()
def visit_inputs(
    model: Any,
    tokens: Tensor,
    names: Sequence[str],
    visit: Callable[[str, Tensor], None],
    progress: Progress = silent,
    stage: str = "calibration",
) -> None:
    """Call `visit(name, x)` with the inputs x [tokens, K] of linear modules, a few blocks of tokens at a time.

    Args:
        model: a transformers model.
        tokens: int64 [blocks, length].
        names: names of the modules; `HEAD` for the head.
        visit: called once per module and batch.
        progress: called after each batch.
        stage: name of the stage in progress reports.
    """

    def watch(name: str) -> Callable[[Any, Any], None]:
        return lambda _, inputs: visit(name, inputs[0].flatten(0, -2))

    with ExitStack() as hooks:
        for name in names:
            if name != HEAD:
                hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(watch(name)))
        for start in range(0, len(tokens), _BATCH):
            rows = tokens[start : start + _BATCH].to(model.device)
            out = model.get_decoder()(input_ids=rows, use_cache=False)
            if HEAD in names:  # its input suffices, no logits are computed
                visit(HEAD, out.last_hidden_state.flatten(0, -2))
            progress(start + len(rows), len(tokens), stage)


def measure_moments(model: Any, tokens: Tensor, names: Sequence[str], progress: Progress = silent) -> dict[str, Tensor]:
    """Return name → H = E[x xᵀ] over all tokens, float32 [K, K] on the model's device, of the inputs of linear modules.

    Args:
        model: a transformers model in full precision.
        tokens: int64 [blocks, length].
        names: see `visit_inputs`; all moments are in memory at once.
        progress: called after each batch.
    """
    moments: dict[str, Tensor] = {}

    def collect(name: str, inputs: Tensor) -> None:
        x = inputs.float()
        if name not in moments:
            moments[name] = x.new_zeros(x.shape[1], x.shape[1])
        with full_float32():
            moments[name].addmm_(x.t(), x, alpha=1 / tokens.numel())

    visit_inputs(model, tokens, names, collect, progress)
    return moments


def _free(device: torch.device) -> int:
    return free_device_memory(device) if device.type == "cuda" else free_memory()


class InputMoments:
    """The second moments of one checkpoint and calibration, measured on first use and cached on disk.

    Matrices of a fused group (q/k/v, gate/up) share one; a tied table has that of the head. To measure, the model is
    loaded in float32, on `compute` if it fits in half of the free memory there. Each run over the tokens measures as
    many moments as fit in half of the memory that is then free.

    Args:
        checkpoint: the model.
        calibration: the tokens.
        progress: called while moments are measured.
        compute: torch device that runs the model; moments are returned on it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        calibration: Calibration,
        progress: Progress = silent,
        compute: str | torch.device = "cpu",
    ) -> None:
        self._checkpoint, self.calibration, self._progress = checkpoint, calibration, progress
        self._compute = torch.device(compute)
        self._root = cache_directory() / "moments" / checkpoint.fingerprint / calibration.hash
        sweep(self._root)
        self.leader = {name: group[0] for group in checkpoint.matrices.groups for name in group}
        """Matrix → first matrix with the same input, whose name the shared moment has."""
        if checkpoint.matrices.tied:
            self.leader[EMBEDDING] = HEAD
        self._width = {self.leader[matrix.name]: matrix.K for matrix in checkpoint.matrices.matrices}
        self._moments: dict[str, Tensor] = {}
        self._is_cache_writable = True  # whether the last moment could be written

    def get(self, name: str) -> Tensor:
        """Return the moment [K, K] of the input of matrix `name`, float32.

        Raises:
            ConfigError: it is an untied embedding, which reads token ids.
            CheckpointError: the model cannot be loaded.
        """
        if name == EMBEDDING and not self._checkpoint.matrices.tied:
            raise ConfigError(f"{name} reads token ids, which have no second moment; encode it with mse")
        leader = self.leader[name]
        if leader not in self._moments:
            moment = self._read(leader)
            self._moments = {}  # one at a time: the rest is on disk, and callers go group by group
            self._moments[leader] = (moment if moment is not None else self._measure(leader)).to(self._compute)
        return self._moments[leader]

    def release(self) -> None:
        """Free the memory of the last moment; it stays on disk."""
        self._moments = {}

    def _read(self, leader: str) -> Tensor | None:
        entry = read_tensors(self._root / f"{leader}.safetensors")
        if entry is None or entry[1].get("place") != self._place(leader):
            return None
        moment = entry[0].get("moment")
        K = self._width[leader]
        return moment if moment is not None and moment.shape == (K, K) else None

    def _place(self, leader: str) -> str:
        """Return the identity stored in a file, so that a renamed file is not read."""
        return f"{self._root.parent.name}/{self._root.name}/{leader}"

    def _measure(self, name: str) -> Tensor:
        """Measure every moment that is not on disk, so that the model is loaded once, and return that of `name`.

        If the cache cannot be written, measure only `name`, as all may not fit in memory.
        """
        leaders = [leader for leader in self._width if leader != EMBEDDING] if self._is_cache_writable else [name]
        missing = [leader for leader in leaders if leader == name or self._read(leader) is None]
        model, tokens = load_model(self._checkpoint), self.calibration.tokens
        if sum(weight.nbytes for weight in model.parameters()) <= _free(self._compute) // 2:
            model = model.to(self._compute)
        limit = max(_MIN_BYTES, _free(model.device) // 2)
        runs: list[list[str]] = [[]]
        size = 0
        for leader in missing:
            more = 4 * self._width[leader] ** 2
            if runs[-1] and size + more > limit:
                runs.append([])
                size = 0
            runs[-1].append(leader)
            size += more
        for run in runs:
            for leader, measured in measure_moments(model, tokens, run, self._progress).items():
                moment = measured.cpu()
                self._is_cache_writable = False
                with cache_writing():
                    write_tensors(
                        self._root / f"{leader}.safetensors", {"moment": moment}, {"place": self._place(leader)}
                    )
                    self._is_cache_writable = True
                if leader == name:
                    result = moment
        return result
