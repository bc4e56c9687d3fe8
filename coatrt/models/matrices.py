"""The quantizable matrices of a model: names, shapes, kinds, layers, and which of them one kernel reads together."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from coatrt.errors import CheckpointError
from coatrt.system.ranges import Bytes, Count

__all__ = ["EMBEDDING", "HEAD", "Matrix", "ModelMatrices", "fused_name", "matrices_of"]

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_MOST_DIGITS = 4  # of a layer's number
_MOST_PARAMETERS = 2**50  # of which sums of bits stay below 2^63
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_JOINT = ("qkv_proj", "gate_up_proj")


def fused_name(name: str) -> str:
    """Return what a matrix and those that read the same input are called together, "" where it reads alone.

    `model.layers.3.mlp.up_proj` → `model.layers.3.mlp.gate_up_proj`.
    """
    parent, _, kind = name.rpartition(".")
    joint = next((joint for joint, kinds in zip(_JOINT, _FUSED, strict=True) if kind in kinds), "")
    return f"{parent}.{joint}" if joint and parent else ""


class Matrix(NamedTuple):
    """One quantizable weight; [name, N, K] in JSON.

    Args:
        name: Hugging Face module name (`model.layers.3.mlp.up_proj`).
        N: output width (vocabulary for embedding and head).
        K: input width; formats put their blocks along it.
    """

    name: str
    N: Count
    K: Count

    @property
    def layer(self) -> int:
        """Decoder layer, or -1 for embedding and head."""
        match = _LAYER.fullmatch(self.name)
        return int(match[1]) if match else -1

    @property
    def kind(self) -> str:
        """Module kind, the last part of the name: q_proj, up_proj, embed_tokens, lm_head."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def is_table(self) -> bool:
        """Whether this is the embedding or the LM head, which carry no LoRA."""
        return self.layer < 0


@dataclass(frozen=True)
class ModelMatrices:
    """All matrices of one model, in network order.

    Args:
        matrices: embedding first, then layer by layer, then the head where it is a table of its own.
        tied: whether the head reads the embedding table (then the table is counted once).
        other_bytes: bytes of everything that is never quantized (norms, biases), at 2 bytes an element.

    Raises:
        CheckpointError: none, a name twice, a layer or a number of weights beyond all measure.
    """

    matrices: tuple[Matrix, ...]
    tied: bool
    other_bytes: Bytes = 0

    def __post_init__(self) -> None:
        if not self.matrices or len(self.by_name) < len(self.matrices):
            raise CheckpointError(
                "a model needs matrices, each of a name of its own; take it from the checkpoint again"
            )
        for matrix in self.matrices:
            if (found := _LAYER.fullmatch(matrix.name)) and len(found[1]) > _MOST_DIGITS:
                raise CheckpointError(
                    f"{matrix.name[:80]} lies in no layer below {10**_MOST_DIGITS}; fetch the model again"
                )
        if self.parameters > _MOST_PARAMETERS:
            raise CheckpointError(f"{self.parameters} weights are more than {_MOST_PARAMETERS}; fetch the model again")

    @cached_property
    def by_name(self) -> Mapping[str, Matrix]:
        """Matrices by name."""
        return {matrix.name: matrix for matrix in self.matrices}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names in network order."""
        return tuple(matrix.name for matrix in self.matrices)

    @cached_property
    def targets(self) -> tuple[Matrix, ...]:
        """Matrices that carry a LoRA: all but embedding and head."""
        return tuple(matrix for matrix in self.matrices if not matrix.is_table)

    @cached_property
    def multiplied(self) -> tuple[Matrix, ...]:
        """Matrices that every token is multiplied with: an embedding beside a head of its own is only looked up."""
        return self.matrices if self.tied else self.matrices[1:]

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Fused groups (q/k/v; gate/up) and the remaining matrices, each name exactly once, in network order."""
        taken: set[str] = set()
        groups = []
        for matrix in self.matrices:
            if matrix.name in taken:
                continue
            parent, _, kind = matrix.name.rpartition(".")
            kinds: Sequence[str] = next((fused for fused in _FUSED if kind in fused), (kind,))
            names = [f"{parent}.{kind}" if parent else kind for kind in kinds]
            group = tuple(name for name in names if name in self.by_name)
            taken.update(group)
            groups.append(group)
        return tuple(groups)

    @cached_property
    def parameters(self) -> int:
        """Number of weights in all matrices."""
        return sum(matrix.N * matrix.K for matrix in self.matrices)


def matrices_of(shapes: Mapping[str, Sequence[int]], tied: bool) -> ModelMatrices:
    """Return the inventory of a checkpoint from its tensor names and shapes.

    Args:
        shapes: tensor name → shape, Hugging Face layout (`….weight` is [N, K]).
        tied: the checkpoint's `tie_word_embeddings`.

    Raises:
        CheckpointError: there is no embedding table, or no decoder layer.
    """
    found, other = [], 0
    for name, shape in shapes.items():
        if tied and name == f"{HEAD}.weight":
            continue
        stem = name.removesuffix(".weight")
        if name.endswith(".weight") and len(shape) == 2 and (_LAYER.fullmatch(stem) or stem in (EMBEDDING, HEAD)):
            found.append(Matrix(stem, int(shape[0]), int(shape[1])))
        else:
            other += 2 * math.prod(shape)
    order = {kind: i for i, kind in enumerate(_ORDER)}
    rank = {EMBEDDING: -1, HEAD: 1 << 30}
    found.sort(key=lambda m: (rank.get(m.name, m.layer), order.get(m.kind, len(order)), m.name))
    names = {matrix.name for matrix in found}
    if EMBEDDING not in names or not any(matrix.layer >= 0 for matrix in found):
        raise CheckpointError(
            f"the checkpoint has no {EMBEDDING}.weight or no model.layers.N; "
            "give a decoder-only language model of the Llama family in Hugging Face layout"
        )
    if not tied and HEAD not in names:
        raise CheckpointError("the checkpoint has no lm_head.weight and does not tie it; give a causal language model")
    return ModelMatrices(tuple(found), tied, other)
