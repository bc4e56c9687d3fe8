"""What a graph, the hypernetwork and every runtime agree on: the LoRA tensors and the decoder's inputs and outputs."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from coatrt.errors import ConfigError
from coatrt.models.matrices import ModelMatrices, fused_name
from coatrt.system.ranges import Count, Layers

__all__ = ["ACTIVATIONS", "DecoderIO", "LoraContract", "LoraGroup", "LoraTensor", "Place", "contract_for"]

ACTIVATIONS = ("float32", "float16", "bfloat16")
_MOST_ALPHA = 1e6  # of training too
_RANK_STEP = 16  # tensor cores work on tiles of 16: another rank would be padded by every runtime


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
        group: what it is called with the matrices that read the same input (`model.layers.3.mlp.gate_up_proj`): in a
            graph they share one A and one B. Empty where it reads alone.
    """

    matrix: str
    A: str
    B: str
    K: Count
    N: Count
    rank: Count
    group: str = ""


class Place(NamedTuple):
    """Where a LoRA tensor lies in the input of a graph: the input, and the tensor's first row and column there."""

    input: str
    row: int
    column: int


@dataclass(frozen=True)
class LoraGroup:
    """The LoRA inputs of a graph for one matrix, or for those that read the same input.

    A [K, sum of ranks] holds their A side by side, B [sum of ranks, sum of N] theirs along its diagonal, and zeros.

    Args:
        name: of the group, or of the matrix.
        tensors: of each matrix, in network order.
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
        alpha: LoRA scale numerator; alpha/rank, with the rank of its matrix, is already folded into every B.
        dtype: dtype of the tensors in files and out of the hypernetwork; a runtime casts them to its activations.
        tensors: one entry per matrix that carries a LoRA, in network order.
        scale_rule: for readers of the file, where the scale is.

    Raises:
        ConfigError: a rank is no multiple of 16, a name repeats, or a field is out of range.
    """

    alpha: float
    dtype: str
    tensors: tuple[LoraTensor, ...]
    scale_rule: Literal["alpha/rank is folded into B"] = "alpha/rank is folded into B"

    def __post_init__(self) -> None:
        for tensor in self.tensors:
            if tensor.rank < 1 or tensor.rank % _RANK_STEP:
                raise ConfigError(
                    f"LoRA rank {tensor.rank} is given; allowed: multiples of {_RANK_STEP}; choose 16 or 32"
                )
        if not 0 < self.alpha <= _MOST_ALPHA:
            raise ConfigError(
                f"LoRA alpha {self.alpha} is given; give a positive number up to {_MOST_ALPHA:g}, such as 32"
            )
        if self.dtype not in ACTIVATIONS:
            raise ConfigError(f"LoRA dtype {self.dtype!r} is given; allowed: {', '.join(ACTIVATIONS)}; use float32")
        names = list(self.shapes)
        if not names or len(names) != 2 * len(self.tensors):
            raise ConfigError(
                f"the LoRA contract has {len(self.tensors)} matrices and {len(names)} distinct tensor names; "
                "give at least one matrix, with two names of its own each"
            )
        for tensor in self.tensors:
            if tensor.K < 1 or tensor.N < 1:
                raise ConfigError(f"LoRA of {tensor.matrix} has K {tensor.K} and N {tensor.N}; give positive widths")
        for group in self.groups:
            if len({tensor.K for tensor in group.tensors}) > 1:
                raise ConfigError(
                    f"the LoRA matrices of {group.name} differ in K; they read one input, so give one width"
                )
        if len(self.inputs) != 2 * len(self.groups):
            raise ConfigError("two groups of the LoRA contract have one name; keep the matrices of a group together")

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(tensor.rank for tensor in self.tensors)

    def scale(self, tensor: LoraTensor) -> float:
        """Return alpha/rank, the factor folded into the B of a matrix."""
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
        """Matrices that share their inputs in a graph, in contract order."""
        runs = itertools.groupby(self.tensors, lambda tensor: tensor.group or tensor.matrix)
        return tuple(LoraGroup(name, tuple(tensors)) for name, tensors in runs)

    @cached_property
    def inputs(self) -> Mapping[str, tuple[int, int]]:
        """Input of a graph → shape, in contract order: A then B of each group."""
        pairs = (((g.A, (g.K, g.rank)), (g.B, (g.rank, g.N))) for g in self.groups)
        return dict(itertools.chain.from_iterable(pairs))

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """Tensor name → where it lies in the inputs of a graph."""
        found: dict[str, Place] = {}
        for group in self.groups:
            rank = N = 0
            for tensor in group.tensors:
                found[tensor.A], found[tensor.B] = Place(group.A, 0, rank), Place(group.B, rank, N)
                rank, N = rank + tensor.rank, N + tensor.N
        return found

    def joined(self, tensors: Mapping[str, NDArray[Any]], dtype: DTypeLike = np.float32) -> dict[str, NDArray[Any]]:
        """Return the inputs of a graph from the tensors of the contract."""
        found = {name: np.zeros(shape, dtype) for name, shape in self.inputs.items()}
        for (name, (rows, columns)), place in zip(self.shapes.items(), self.places.values(), strict=True):
            whole = found[place.input]
            whole[place.row : place.row + rows, place.column : place.column + columns] = tensors[name]
        return found


def contract_for(model: ModelMatrices, rank: int, alpha: float, ranks: Mapping[str, int] | None = None) -> LoraContract:
    """Return the contract of a model: a LoRA on every matrix but embedding and head, in network order.

    Args:
        model: inventory of the model.
        rank: LoRA rank, a multiple of 16.
        alpha: LoRA scale numerator.
        ranks: module kind → rank where it differs.

    Raises:
        ConfigError: a rank is no multiple of 16, alpha is not positive, or the model has no such kind.
    """
    ranks, kinds = ranks or {}, {matrix.kind for matrix in model.targets}
    if unknown := set(ranks) - kinds:
        raise ConfigError(f"a rank of {', '.join(sorted(unknown))} is given; the model has {', '.join(sorted(kinds))}")
    tensors = tuple(
        LoraTensor(
            m.name, f"lora_A.{m.name}", f"lora_B.{m.name}", m.K, m.N, ranks.get(m.kind, rank), fused_name(m.name)
        )
        for m in model.targets
    )
    return LoraContract(float(alpha), "float32", tensors)


@dataclass(frozen=True)
class DecoderIO:
    """The facts a runtime needs to bind a decoder graph; the names of its inputs and outputs follow from them.

    Args:
        layers: decoder layers, each with one key and one value cache.
        kv_heads: heads of each cache.
        head_dim: width of one head.
        vocabulary: width of the logits.
        cache_length: slots of each cache, or None where the graph leaves them open.
        activations: dtype of caches and LoRA inputs; logits have it too.
        max_positions: rows of the rotary tables; positions stay below it.

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
                raise ConfigError(f"decoder {name} is {value!r}; give a whole number of at least 1")
        if self.activations not in ACTIVATIONS:
            raise ConfigError(f"decoder activations {self.activations!r} are given; allowed: {', '.join(ACTIVATIONS)}")

    @property
    def past_names(self) -> tuple[str, ...]:
        """Names of the cache inputs, key then value of each layer."""
        return tuple(f"past_key_values.{layer}.{part}" for layer in range(self.layers) for part in ("key", "value"))

    @property
    def present_names(self) -> tuple[str, ...]:
        """Names of the cache outputs, in the order of `past_names`; a runtime binds the same buffers."""
        return tuple(f"present.{layer}.{part}" for layer in range(self.layers) for part in ("key", "value"))
