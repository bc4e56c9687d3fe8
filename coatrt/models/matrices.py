"""The quantizable matrices of a model: names, shapes, kinds, layers and fused groups."""

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
_MAX_DIGITS = 4  # of a layer number
_MAX_PARAMETERS = 2**50  # keeps sums of bits below 2^63
_ORDER = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"]
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_FUSED_NAMES = ("qkv_proj", "gate_up_proj")


def fused_name(name: str) -> str:
    """Return the name of a matrix's fused group, the matrices that read the same input; "" if it has none.

    `model.layers.3.mlp.up_proj` → `model.layers.3.mlp.gate_up_proj`.
    """
    parent, _, kind = name.rpartition(".")
    fused = next((fused for fused, kinds in zip(_FUSED_NAMES, _FUSED, strict=True) if kind in kinds), "")
    return f"{parent}.{fused}" if fused and parent else ""


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
        matrices: embedding first, then layer by layer, then the head unless it is tied.
        tied: whether the head uses the embedding table, which is then counted once.
        other_bytes: bytes of all tensors that are never quantized (norms, biases), at 2 bytes per element.

    Raises:
        CheckpointError: no matrix, a repeated name, or too many layers or weights.
    """

    matrices: tuple[Matrix, ...]
    tied: bool
    other_bytes: Bytes = 0

    def __post_init__(self) -> None:
        if not self.matrices or len(self.by_name) < len(self.matrices):
            raise CheckpointError(
                "a model needs at least one matrix, and names must not repeat; build it from the checkpoint again"
            )
        for matrix in self.matrices:
            if (match := _LAYER.fullmatch(matrix.name)) and len(match[1]) > _MAX_DIGITS:
                raise CheckpointError(
                    f"the layer of {matrix.name[:80]} must be below {10**_MAX_DIGITS}; download the model again"
                )
        if self.parameters > _MAX_PARAMETERS:
            raise CheckpointError(
                f"weights must be at most {_MAX_PARAMETERS}, got {self.parameters}; download the model again"
            )

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
        """Target modules, which carry a LoRA: all matrices but embedding and head."""
        return tuple(matrix for matrix in self.matrices if not matrix.is_table)

    @cached_property
    def multiplied(self) -> tuple[Matrix, ...]:
        """Matrices that every token is multiplied by: an untied embedding is only looked up."""
        return self.matrices if self.tied else self.matrices[1:]

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Fused groups (q/k/v, gate/up) and single matrices, each name once, in network order."""
        grouped: set[str] = set()
        groups = []
        for matrix in self.matrices:
            if matrix.name in grouped:
                continue
            parent, _, kind = matrix.name.rpartition(".")
            kinds: Sequence[str] = next((fused for fused in _FUSED if kind in fused), (kind,))
            names = [f"{parent}.{kind}" if parent else kind for kind in kinds]
            group = tuple(name for name in names if name in self.by_name)
            grouped.update(group)
            groups.append(group)
        return tuple(groups)

    @cached_property
    def fused(self) -> Mapping[str, str]:
        """Matrix → `fused_name` of its group; "" where it is the only one, such as the MLP's first without a gate."""
        return {name: fused_name(name) if len(group) > 1 else "" for group in self.groups for name in group}

    @cached_property
    def parameters(self) -> int:
        """Number of weights in all matrices."""
        return sum(matrix.N * matrix.K for matrix in self.matrices)


def matrices_of(shapes: Mapping[str, Sequence[int]], tied: bool) -> ModelMatrices:
    """Return the matrices of a checkpoint from its tensor names and shapes.

    Args:
        shapes: tensor name → shape, Hugging Face layout (`….weight` is [N, K]).
        tied: the checkpoint's `tie_word_embeddings`.

    Raises:
        CheckpointError: there is no embedding table, no decoder layer, or no head.
    """
    matrices, other = [], 0
    for name, shape in shapes.items():
        if tied and name == f"{HEAD}.weight":
            continue
        stem = name.removesuffix(".weight")
        is_place = _LAYER.fullmatch(stem) is not None or stem in (EMBEDDING, HEAD)
        if name.endswith(".weight") and len(shape) == 2 and is_place and not stem.endswith("norm"):
            matrices.append(Matrix(stem, int(shape[0]), int(shape[1])))
        else:
            other += 2 * math.prod(shape)
    order = {kind: i for i, kind in enumerate(_ORDER)}
    rank = {EMBEDDING: -1, HEAD: 1 << 30}
    matrices.sort(key=lambda m: (rank.get(m.name, m.layer), order.get(m.kind, len(order)), m.name))
    names = {matrix.name for matrix in matrices}
    if EMBEDDING not in names or not any(matrix.layer >= 0 for matrix in matrices):
        raise CheckpointError(
            f"the checkpoint has no {EMBEDDING}.weight or no model.layers.N; "
            "give a decoder-only language model of the Llama family in Hugging Face layout"
        )
    if not tied and HEAD not in names:
        raise CheckpointError("the checkpoint has no lm_head.weight and no tied head; give a causal language model")
    return ModelMatrices(tuple(matrices), tied, other)
