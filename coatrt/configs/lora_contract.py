"""The contract between graph, hypernetwork and runtimes: LoRA tensors, and the decoder's inputs and outputs."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from coatrt.errors import ConfigError
from coatrt.models.matrices import ModelMatrices
from coatrt.system.ranges import Count, Layers

__all__ = ["ACTIVATIONS", "DecoderIO", "LoraContract", "LoraGroup", "LoraTensor", "Place", "contract_for"]

ACTIVATIONS = ("float32", "float16", "bfloat16")
_MAX_ALPHA = 1e6  # also the limit of training
_RANK_STEP = 16  # tensor cores use tiles of 16, so runtimes would pad any other rank


@dataclass(frozen=True)
class LoraTensor:
    """The two LoRA tensors of one matrix: y = x·W + (x·A)·B.

    Args:
        matrix: name of the matrix, as in `coatrt.models.matrices`.
        A: tensor name of A, shape [K, rank].
        B: tensor name of B, shape [rank, N], times alpha/rank.
        K: input width.
        N: output width.
        rank: columns of A and rows of B, a multiple of 16.
        group: name of the fused group, the matrices that read the same input (`model.layers.3.mlp.gate_up_proj`); in a
            graph they share one A and one B. Empty for a matrix without a group.
    """

    matrix: str
    A: str
    B: str
    K: Count
    N: Count
    rank: Count
    group: str = ""


class Place(NamedTuple):
    """Place of a LoRA tensor in a graph input: the input's name, and the tensor's first row and column in it."""

    input: str
    row: int
    column: int


@dataclass(frozen=True)
class LoraGroup:
    """The LoRA inputs of a graph for one matrix or one fused group.

    A [K, sum of ranks] holds the A of all matrices side by side, B [sum of ranks, sum of N] is block-diagonal.

    Args:
        name: name of the group, or of its only matrix.
        tensors: one entry per matrix, in network order.
    """

    name: str
    tensors: tuple[LoraTensor, ...]

    @property
    def A(self) -> str:
        """Name of the input A."""
        return self.tensors[0].A if len(self.tensors) == 1 else f"lora_A.{self.name}"

    @property
    def B(self) -> str:
        """Name of the input B."""
        return self.tensors[0].B if len(self.tensors) == 1 else f"lora_B.{self.name}"

    @property
    def K(self) -> int:
        """Input width."""
        return self.tensors[0].K

    @property
    def N(self) -> int:
        """Sum of the output widths."""
        return sum(tensor.N for tensor in self.tensors)

    @property
    def rank(self) -> int:
        """Sum of the ranks."""
        return sum(tensor.rank for tensor in self.tensors)


@dataclass(frozen=True)
class LoraContract:
    """Names, shapes and scale of every LoRA tensor of one model (`lora_io.json`).

    Args:
        alpha: LoRA scale numerator; every B already includes alpha/rank, with the rank of its matrix.
        dtype: dtype of the tensors in files and from the hypernetwork; a runtime casts them to its activations.
        tensors: one entry per target module, in network order.
        scale_rule: says in the file where the scale is.

    Raises:
        ConfigError: a rank is not a multiple of 16, a name repeats, or a field is out of range.
    """

    alpha: float
    dtype: str
    tensors: tuple[LoraTensor, ...]
    scale_rule: Literal["alpha/rank is folded into B"] = "alpha/rank is folded into B"

    def __post_init__(self) -> None:
        for tensor in self.tensors:
            if tensor.rank < 1 or tensor.rank % _RANK_STEP:
                raise ConfigError(f"the LoRA rank must be a multiple of {_RANK_STEP}, got {tensor.rank}")
        if not 0 < self.alpha <= _MAX_ALPHA:
            raise ConfigError(f"LoRA alpha must be above 0 and at most {_MAX_ALPHA:g}, got {self.alpha}")
        if self.dtype not in ACTIVATIONS:
            raise ConfigError(f"the LoRA dtype must be one of {', '.join(ACTIVATIONS)}, got {self.dtype!r}")
        names = list(self.shapes)
        if not names or len(names) != 2 * len(self.tensors):
            raise ConfigError(
                f"the LoRA contract has {len(self.tensors)} matrices and {len(names)} distinct tensor names; "
                "each matrix, at least one, needs two names of its own"
            )
        for tensor in self.tensors:
            if tensor.K < 1 or tensor.N < 1:
                raise ConfigError(f"K and N of {tensor.matrix} must be at least 1, got {tensor.K} and {tensor.N}")
        for group in self.groups:
            if len({tensor.K for tensor in group.tensors}) > 1:
                raise ConfigError(f"the matrices of {group.name} differ in K; a group reads one input of one width")
        if len(self.inputs) != 2 * len(self.groups):
            raise ConfigError(
                "two groups of the LoRA contract have the same name; list the matrices of a group together"
            )

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(tensor.rank for tensor in self.tensors)

    def scale(self, tensor: LoraTensor) -> float:
        """Return alpha/rank, the factor that the B of a matrix includes."""
        return self.alpha / tensor.rank

    @cached_property
    def by_matrix(self) -> Mapping[str, LoraTensor]:
        """Entries by matrix name."""
        return {tensor.matrix: tensor for tensor in self.tensors}

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Tensor name → shape, in contract order: A then B of each matrix."""
        pairs = (((t.A, (t.K, t.rank)), (t.B, (t.rank, t.N))) for t in self.tensors)
        return dict(itertools.chain.from_iterable(pairs))

    @cached_property
    def groups(self) -> tuple[LoraGroup, ...]:
        """Fused groups and single matrices, in contract order; each has one A and one B in a graph."""
        runs = itertools.groupby(self.tensors, lambda tensor: tensor.group or tensor.matrix)
        return tuple(LoraGroup(name, tuple(tensors)) for name, tensors in runs)

    @cached_property
    def inputs(self) -> Mapping[str, tuple[int, int]]:
        """Graph input → shape, in contract order: A then B of each group."""
        pairs = (((g.A, (g.K, g.rank)), (g.B, (g.rank, g.N))) for g in self.groups)
        return dict(itertools.chain.from_iterable(pairs))

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """Tensor name → its place in the graph inputs."""
        places: dict[str, Place] = {}
        for group in self.groups:
            rank = N = 0
            for tensor in group.tensors:
                places[tensor.A], places[tensor.B] = Place(group.A, 0, rank), Place(group.B, rank, N)
                rank, N = rank + tensor.rank, N + tensor.N
        return places

    def graph_inputs(
        self, tensors: Mapping[str, NDArray[Any]], dtype: DTypeLike = np.float32
    ) -> dict[str, NDArray[Any]]:
        """Return the graph inputs that hold the tensors of the contract."""
        inputs = {name: np.zeros(shape, dtype) for name, shape in self.inputs.items()}
        for (name, (rows, columns)), place in zip(self.shapes.items(), self.places.values(), strict=True):
            target = inputs[place.input]
            target[place.row : place.row + rows, place.column : place.column + columns] = tensors[name]
        return inputs


def contract_for(model: ModelMatrices, rank: int, alpha: float, ranks: Mapping[str, int] | None = None) -> LoraContract:
    """Return the contract of a model: a LoRA on every matrix but embedding and head, in network order.

    Args:
        model: matrices of the model.
        rank: LoRA rank, a multiple of 16.
        alpha: LoRA scale numerator.
        ranks: target module → rank, where it differs.

    Raises:
        ConfigError: a rank is not a multiple of 16, alpha is not positive, or the model has no such target module.
    """
    ranks, kinds = ranks or {}, {matrix.kind for matrix in model.targets}
    if unknown := set(ranks) - kinds:
        raise ConfigError(f"unknown target module {', '.join(sorted(unknown))}; allowed: {', '.join(sorted(kinds))}")
    tensors = tuple(
        LoraTensor(
            m.name, f"lora_A.{m.name}", f"lora_B.{m.name}", m.K, m.N, ranks.get(m.kind, rank), model.fused[m.name]
        )
        for m in model.targets
    )
    return LoraContract(float(alpha), "float32", tensors)


@dataclass(frozen=True)
class DecoderIO:
    """Shapes and dtype that a runtime needs to bind a decoder graph; they determine the names of inputs and outputs.

    Args:
        layers: decoder layers, each with one key and one value cache.
        kv_heads: heads of each cache.
        head_dim: width of one head.
        vocabulary: width of the logits.
        cache_length: slots of each cache, or None where they are a dynamic dimension.
        activations: dtype of caches, LoRA inputs and logits.
        max_positions: rows of the rotary tables; every position is below it.

    Raises:
        ConfigError: a count is not positive or the dtype is unknown.
    """

    layers: Layers
    kv_heads: Count
    head_dim: Count
    vocabulary: Count
    cache_length: Count | None
    activations: str
    max_positions: Count

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim", "vocabulary", "cache_length", "max_positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"decoder {name} must be a whole number of at least 1, got {value!r}")
        if self.activations not in ACTIVATIONS:
            raise ConfigError(f"decoder activations must be one of {', '.join(ACTIVATIONS)}, got {self.activations!r}")

    @property
    def past_names(self) -> tuple[str, ...]:
        """Names of the cache inputs, key then value of each layer."""
        return tuple(f"past_key_values.{layer}.{part}" for layer in range(self.layers) for part in ("key", "value"))

    @property
    def present_names(self) -> tuple[str, ...]:
        """Names of the cache outputs, in the order of `past_names`; a runtime binds the same buffers to both."""
        return tuple(f"present.{layer}.{part}" for layer in range(self.layers) for part in ("key", "value"))
