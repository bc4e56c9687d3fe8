"""Calibration: tokens, and the second moments H = E[x xᵀ] of what every linear matrix reads while they run through."""

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

__all__ = ["Calibration", "InputMoments", "calibration_examples", "measure_moments", "tokens_wanted", "visit_inputs"]

_KEY = "tokens"
_TOKENS_PER_INPUT = 4
_BATCH = 4  # blocks in one forward pass
_LEAST = 1 << 30  # bytes of moments measured at once however little memory is free


@dataclass(frozen=True, eq=False)
class Calibration:
    """The tokens that a model is calibrated on.

    Args:
        tokens: int64 [blocks, length], at least one.
    """

    tokens: Tensor

    @classmethod
    def of(cls, examples: Examples) -> "Calibration":
        """Return the tokens of examples, padding left out: rows one after the other, cut to their length."""
        width = examples.tokens.shape[1]
        used = torch.arange(width) <= examples.last[:, None]
        if bool(used.all()):
            return cls(examples.tokens)
        stream = examples.tokens[used]
        return cls(stream[: max(1, len(stream) // width) * width].view(-1, min(width, len(stream))))

    @cached_property
    def hash(self) -> str:
        """First 16 hexadecimal digits of a SHA-256 over shape and tokens."""
        return hash_tensors({_KEY: self.tokens})[:16]

    def save(self, path: Path) -> None:
        """Write the tokens as safetensors, atomically."""
        write_tensors(path, {_KEY: self.tokens})

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Return the tokens in a file that `save` wrote.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        found = read_tensors(path)
        if found is None or _KEY not in found[0]:
            raise CheckpointError(f"{path} is missing or damaged; copy it again")
        return cls(found[0][_KEY])


def calibration_examples(train: Examples, count: int, length: int, seed: int) -> Examples:
    """Return the examples to calibrate on: `count` of them, of short ones as many as hold count · length tokens.

    Args:
        train: what to choose from; all of it where it holds less.
        count: examples at least.
        length: tokens of a whole example.
        seed: of the order.
    """
    order = batches(len(train), len(train), 0, seed)
    tokens = (train.last[order] + 1).cumsum(0)
    enough = int((tokens < count * length).sum()) + 1
    return train[order[: max(count, enough)]]


def tokens_wanted(model: ModelMatrices) -> int:
    """Return how many tokens error feedback should be calibrated on: four for each input of the widest matrix.

    With fewer it can make up for less (`benchmarks/calibration_size.py`, docs/formats.md).
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
        names: of the modules, the head among them as `HEAD`.
        visit: called for every module and batch.
        progress: called after each batch.
        stage: what the progress is of.
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
            if HEAD in names:  # its logits are not needed, only what it reads
                visit(HEAD, out.last_hidden_state.flatten(0, -2))
            progress(start + len(rows), len(tokens), stage)


def measure_moments(model: Any, tokens: Tensor, names: Sequence[str], progress: Progress = silent) -> dict[str, Tensor]:
    """Return name → H = E[x xᵀ] over all tokens, float32 [K, K] on the model's device, of the inputs of linear modules.

    Args:
        model: a transformers model in full precision.
        tokens: int64 [blocks, length].
        names: see `visit_inputs`; all their moments are in memory at once.
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
    """The second moments of one checkpoint under one calibration, measured when first asked for and kept on disk.

    Matrices that read the same input (q/k/v, gate/up) share one; a tied table has that of the head. The model is loaded
    in float32 for as long as moments are measured, on `compute` if it fits in half of the memory free there: as many
    groups of matrices at once as half of what is then free holds, one run over the tokens each.

    Args:
        checkpoint: the model.
        calibration: the tokens.
        progress: called while moments are measured.
        compute: torch device that the model runs on, and where moments are handed out.
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
        """Matrix → the first of the matrices that read what it reads, by which its moment is kept."""
        if checkpoint.matrices.tied:
            self.leader[EMBEDDING] = HEAD
        self._width = {self.leader[matrix.name]: matrix.K for matrix in checkpoint.matrices.matrices}
        self._held: dict[str, Tensor] = {}
        self._kept = True  # whether the last ones could be written

    def get(self, name: str) -> Tensor:
        """Return the moment [K, K] of the input of matrix `name`, float32.

        Raises:
            ConfigError: it is an embedding with a head of its own: what it reads are token ids.
            CheckpointError: the model cannot be loaded.
        """
        if name == EMBEDDING and not self._checkpoint.matrices.tied:
            raise ConfigError(f"{name} reads token ids, which have no second moment; encode it with mse")
        leader = self.leader[name]
        if leader not in self._held:
            found = self._read(leader)
            self._held = {}  # the disk has them; those of one group follow each other
            self._held[leader] = (found if found is not None else self._measure(leader)).to(self._compute)
        return self._held[leader]

    def release(self) -> None:
        """Free the memory of the last moment; the disk has it."""
        self._held = {}

    def _read(self, leader: str) -> Tensor | None:
        found = read_tensors(self._root / f"{leader}.safetensors")
        moment = found[0].get("moment") if found is not None and found[1].get("place") == self._place(leader) else None
        K = self._width[leader]
        return moment if moment is not None and moment.shape == (K, K) else None

    def _place(self, leader: str) -> str:
        """Return what a file says of itself: under another matrix's name it is measured again."""
        return f"{self._root.parent.name}/{self._root.name}/{leader}"

    def _measure(self, wanted: str) -> Tensor:
        """Measure every moment that is not on disk, so that the model is loaded once, and return the one wanted.

        Where the disk takes none, only the one wanted: memory may not hold all.
        """
        leaders = [leader for leader in self._width if leader != EMBEDDING] if self._kept else [wanted]
        missing = [leader for leader in leaders if leader == wanted or self._read(leader) is None]
        model, tokens = load_model(self._checkpoint), self.calibration.tokens
        if sum(weight.nbytes for weight in model.parameters()) <= _free(self._compute) // 2:
            model = model.to(self._compute)
        limit = max(_LEAST, _free(model.device) // 2)
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
                self._kept = False
                with cache_writing():
                    write_tensors(
                        self._root / f"{leader}.safetensors", {"moment": moment}, {"place": self._place(leader)}
                    )
                    self._kept = True
                if leader == wanted:
                    found = moment
        return found
