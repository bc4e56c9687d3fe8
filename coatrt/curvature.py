"""What changing a weight does to the loss, to second order, seen at the inputs and outputs of every matrix.

One pass of forward and backward hands every matrix's inputs x_t and the gradients g_t of its outputs to a visitor; the
weights themselves need no gradient, so no copy of them is made.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coatrt.fakequant import FakeQuantModel
from coatrt.formats import WeightFormat
from coatrt.matrices import EMBEDDING, HEAD
from coatrt.quantize import decode
from coatrt.store import CodeStore

__all__ = ["kfac_costs", "output_gains", "token_costs", "visit_outputs"]

Progress = Callable[[int, int, str], None]
Visitor = Callable[[str, Tensor, Tensor], None]
_BATCH = 4  # blocks per backward pass


def visit_outputs(
    model: FakeQuantModel, blocks: Tensor, visit: Visitor, progress: Progress | None = None, batch: int = _BATCH
) -> None:
    """Call `visit(matrix name, x, g)` for every matrix and batch of blocks.

    x [T, K]: the inputs at all positions that predict a token (int64 [T] token ids for the embedding); g [T, N]: the
    gradient of the sum of the batch's token losses with respect to the outputs there. A tied table is visited twice, as
    embedding and as head, under its one name.

    Args:
        model: configuration and LoRA already set.
        blocks: token ids [blocks, length].
        visit: called during the backward pass; it must not keep x or g.
        progress: called after each batch.
        batch: blocks at once.
    """
    for start in range(0, len(blocks), batch):
        piece = blocks[start : start + batch]
        tokens = len(piece) * (blocks.shape[1] - 1)
        with torch.enable_grad(), _tapped(model, visit, tokens):
            model.loss(piece).backward()  # type: ignore[no-untyped-call]
        if progress is not None:
            progress(min(start + batch, len(blocks)), len(blocks), "gradients")


@contextmanager
def _tapped(model: FakeQuantModel, visit: Visitor, tokens: int) -> Iterator[None]:
    def tap(name: str) -> Callable[..., Tensor]:
        def forward(_: object, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0].detach()
            if not output.requires_grad:  # the first of all, the embedding: what follows needs a gradient to flow
                output = output.detach().requires_grad_()

            def backward(gradient: Tensor) -> None:
                # The last position predicts nothing and its gradient is zero. The loss is a mean over tokens.
                g = gradient[:, :-1].reshape(-1, gradient.shape[-1]) * tokens
                visit(name, x[:, :-1].reshape(g.shape[0], *x.shape[2:]), g)

            output.register_hook(backward)  # type: ignore[no-untyped-call]
            return output

        return forward

    matrices = model.checkpoint.matrices
    taps = [(m.name, m.name) for m in matrices.matrices]
    if matrices.tied:
        taps.append((HEAD, EMBEDDING))
    hooks = [model.model.get_submodule(module).register_forward_hook(tap(name)) for module, name in taps]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _residuals(
    model: FakeQuantModel, codes: CodeStore, name: str, formats: Sequence[WeightFormat]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (format text, W − Q(W) [N, K]) of one matrix; formats that are one for this width are decoded once."""
    weight = model.model.get_submodule(name).weight.detach()
    for fmt in formats:
        yield str(fmt), weight - decode(codes.get(name, fmt).to(model.compute))


def output_gains(model: FakeQuantModel, blocks: Tensor, progress: Progress | None = None) -> dict[str, Tensor]:
    """Return linear matrix → E[g_n²] over tokens, float32 [N], g the gradient of a token's loss at the outputs.

    Args:
        model: full precision is set and no LoRA is bound.
        blocks: calibration tokens [blocks, length].
        progress: called after each batch.
    """
    gains: dict[str, Tensor] = {}
    tokens = len(blocks) * (blocks.shape[1] - 1)

    def visit(name: str, x: Tensor, g: Tensor) -> None:
        if x.dtype != torch.int64:
            square = g.square().sum(0) / tokens
            gains[name] = gains[name] + square if name in gains else square

    visit_outputs(model, blocks, visit, progress)
    return gains


@dataclass
class _Moments:
    """Sums over tokens: of g² [N], of x xᵀ [K, K] (of the head, or of a linear layer), of g² by token id [V, K]."""

    output: Tensor | None = None
    input: Tensor | None = None
    rows: Tensor | None = None


@dataclass
class _Kfac:
    """Collects the moments; matrices of a fused group read one input, so the first of them keeps it for all."""

    first: Mapping[str, str]
    moments: dict[str, _Moments] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, name: str, x: Tensor, g: Tensor) -> None:
        here = self.moments.setdefault(name, _Moments())
        self.tokens[name] = self.tokens.get(name, 0) + (len(x) if x.dtype != torch.int64 else 0)
        if x.dtype == torch.int64:
            if here.rows is None:
                here.rows = torch.zeros(0)
            here.rows = torch.cat([here.rows.view(-1, g.shape[1] + 1), torch.cat([x[:, None].to(g), g.square()], 1)])
            return
        square = g.square().sum(0)
        here.output = square if here.output is None else here.output + square
        if self.first[name] == name:
            moment = x.T @ x
            here.input = moment if here.input is None else here.input + moment


def kfac_costs(
    model: FakeQuantModel,
    codes: CodeStore,
    blocks: Tensor,
    formats: Sequence[WeightFormat],
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Return matrix → format text → ½ Σ_n G_n ΔW_n H ΔW_nᵀ, nats per token.

    G_n = E[g_n²] over tokens, H = E[x xᵀ]: the Fisher of Kronecker factors (Martens and Grosse, arXiv 1503.05671) with
    the output factor's diagonal. An embedding's input is one-hot: its rows are weighted by E[g²] at their own tokens.

    Args:
        model: full precision is set and no LoRA is bound; one [K, K] float32 per fused group is in memory.
        codes: cache of encoded matrices.
        blocks: calibration tokens [blocks, length].
        formats: formats to measure.
        progress: called after each batch and each matrix.
    """
    groups = model.checkpoint.matrices.groups
    first = {name: group[0] for group in groups for name in group}
    found = _Kfac(first)
    visit_outputs(model, blocks, found, progress)
    names, tokens = model.checkpoint.matrices.names, len(blocks) * (blocks.shape[1] - 1)
    costs: dict[str, dict[str, float]] = {}
    for i, name in enumerate(names):
        here, moment = found.moments.get(name, _Moments()), found.moments.get(first[name], _Moments()).input
        costs[name] = {}
        for text, residual in _residuals(model, codes, name, formats):
            total = 0.0
            if here.output is not None and moment is not None:
                total += float(here.output @ ((residual @ moment) * residual).sum(1)) / tokens**2
            if here.rows is not None:
                ids = here.rows[:, 0].long()
                total += float((here.rows[:, 1:] * residual[ids].square()).sum()) / tokens
            costs[name][text] = 0.5 * total
        if progress is not None:
            progress(i + 1, len(names), "formats")
    return costs


def token_costs(
    model: FakeQuantModel,
    codes: CodeStore,
    blocks: Tensor,
    formats: Sequence[WeightFormat],
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Return matrix → format text → ½ E[(g_tᵀ ΔW x_t)²], nats per token.

    The empirical Fisher's quadratic form itself, tokens taken as independent: no diagonal and no factors are assumed,
    and no moment is stored. Each format costs a product of the size of a forward pass.

    Args:
        model: full precision is set and no LoRA is bound.
        codes: cache of encoded matrices.
        blocks: calibration tokens [blocks, length].
        formats: formats to measure.
        progress: called after each batch.
    """
    costs = {name: {str(fmt): 0.0 for fmt in formats} for name in model.checkpoint.matrices.names}
    tokens = len(blocks) * (blocks.shape[1] - 1)

    @torch.no_grad()
    def visit(name: str, x: Tensor, g: Tensor) -> None:
        for text, residual in _residuals(model, codes, name, formats):
            moved = residual[x] if x.dtype == torch.int64 else x @ residual.T
            # An embedding gives K outputs, the residual's row; a linear layer N.
            costs[name][text] += 0.5 * float((g * moved).sum(1).square().sum()) / tokens

    visit_outputs(model, blocks, visit, progress)
    return costs
