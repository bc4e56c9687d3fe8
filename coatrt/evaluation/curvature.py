"""What changing a weight does to the loss, to second order, seen at the inputs and outputs of every matrix.

One pass of forward and backward hands every matrix's inputs x_t and the gradients g_t of its outputs to a visitor; the
weights themselves need no gradient, so no copy of them is made.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coatrt.data.examples import Examples
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.models.matrices import EMBEDDING, HEAD
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.progress import Progress, silent

__all__ = ["kfac_costs", "output_gains", "token_costs", "visit_outputs"]

Visitor = Callable[[str, Tensor, Tensor], None]
_TOKENS = 1024  # of a backward pass, about


def visit_outputs(
    model: FakeQuantModel, examples: Examples | Tensor, visit: Visitor, progress: Progress = silent
) -> None:
    """Call `visit(matrix name, x, g)` for every matrix and batch of examples.

    x [T, K]: the inputs at all positions before the last target of their row, of the head those that predict a target
    (int64 [T] token ids for the embedding); g [T, N]: the gradient of the sum of the batch's token losses with respect
    to the outputs there; both float32. A tied table is visited twice, as embedding and as head, under its one name.

    Args:
        model: configuration and LoRA already set.
        examples: examples, or token ids [blocks, length].
        visit: called during the backward pass; it must not keep x or g.
        progress: called after each batch.
    """
    examples, done = Examples.of(examples), 0
    order = examples.last.argsort(stable=True)  # rows of like length together: less padding
    for rows in torch.split(order, max(1, _TOKENS // examples.tokens.shape[1])):
        batch = examples[rows]
        with torch.enable_grad(), _tapped(model, visit, batch):
            (model.loss(batch) * batch.predicted).backward()  # type: ignore[no-untyped-call]
        done += len(rows)
        progress(done, len(examples), "gradients")


@contextmanager
def _tapped(model: FakeQuantModel, visit: Visitor, batch: Examples) -> Iterator[None]:
    before = torch.arange(batch.tokens.shape[1]) < batch.last[:, None]

    def tap(module: str, name: str) -> Callable[..., Tensor]:
        def forward(_: object, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0].detach()
            if not output.requires_grad:  # the first of all, the embedding: what follows needs a gradient to flow
                output = output.detach().requires_grad_()

            def backward(gradient: Tensor) -> None:
                # The head may see the places of targets alone; where a row has none, its gradient is exactly zero.
                kept = gradient.any(-1) if module == HEAD else before[:, : gradient.shape[1]].to(gradient.device)
                visit(name, x[kept] if x.dtype == torch.int64 else x[kept].float(), gradient[kept].float())

            output.register_hook(backward)  # type: ignore[no-untyped-call]
            return output

        return forward

    matrices = model.checkpoint.matrices
    taps = [(m.name, m.name) for m in matrices.matrices]
    if matrices.tied:
        taps.append((HEAD, EMBEDDING))
    hooks = [model.model.get_submodule(module).register_forward_hook(tap(module, name)) for module, name in taps]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _residuals(
    model: FakeQuantModel, codes: CodeStore, name: str, formats: Sequence[WeightFormat]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (format text, W − Q(W) [N, K]) of one matrix; formats that are one for this width are decoded once."""
    weight = model.weight(name, None)
    for fmt in formats:
        yield str(fmt), weight - decode(codes.get(name, fmt).to(model.compute))


def output_gains(model: FakeQuantModel, examples: Examples | Tensor, progress: Progress = silent) -> dict[str, Tensor]:
    """Return linear matrix → Σ g_n² per target, float32 [N], g the gradients of the summed losses at the outputs.

    Args:
        model: full precision is set and no LoRA is bound.
        examples: calibration examples, or tokens [blocks, length].
        progress: called after each batch.
    """
    examples, gains = Examples.of(examples), dict[str, Tensor]()

    def visit(name: str, x: Tensor, g: Tensor) -> None:
        if x.dtype != torch.int64:
            square = g.square().sum(0) / examples.predicted
            gains[name] = gains[name] + square if name in gains else square

    visit_outputs(model, examples, visit, progress)
    return gains


@dataclass
class _Moments:
    """Sums over positions: of g² [N], of x xᵀ [K, K] (of the head, or of a linear layer), of g² by token id [V, K]."""

    output: Tensor | None = None
    input: Tensor | None = None
    rows: Tensor | None = None
    positions: int = 0


@dataclass
class _Kfac:
    """Collects the moments; matrices of a fused group read one input, so the first of them keeps it for all."""

    first: Mapping[str, str]
    moments: dict[str, _Moments] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, name: str, x: Tensor, g: Tensor) -> None:
        here = self.moments.setdefault(name, _Moments())
        if x.dtype == torch.int64:
            rows = torch.cat([x[:, None].to(g), g.square()], 1)
            here.rows = rows if here.rows is None else torch.cat([here.rows, rows])
            return
        here.positions += len(x)
        square = g.square().sum(0)
        here.output = square if here.output is None else here.output + square
        if self.first[name] == name:
            moment = x.T @ x
            here.input = moment if here.input is None else here.input + moment


def kfac_costs(
    model: FakeQuantModel,
    codes: CodeStore,
    examples: Examples | Tensor,
    formats: Sequence[WeightFormat],
    progress: Progress = silent,
) -> dict[str, dict[str, float]]:
    """Return matrix → format text → ½ Σ_n G_n ΔW_n H ΔW_nᵀ, nats per target.

    G_n = Σ g_n² per target, H = E[x xᵀ] over positions: the Fisher of Kronecker factors (Martens and Grosse, arXiv
    1503.05671) with the output factor's diagonal. An embedding's input is one-hot: its rows are weighted by the g² of
    their own tokens.

    Args:
        model: full precision is set and no LoRA is bound; one [K, K] float32 per fused group is in memory.
        codes: cache of encoded matrices.
        examples: calibration examples, or tokens [blocks, length].
        formats: formats to measure.
        progress: called after each batch and each matrix.
    """
    groups = model.checkpoint.matrices.groups
    first = {name: group[0] for group in groups for name in group}
    examples, found = Examples.of(examples), _Kfac(first)
    visit_outputs(model, examples, found, progress)
    names = model.checkpoint.matrices.names
    costs: dict[str, dict[str, float]] = {}
    for i, name in enumerate(names):
        here, moment = found.moments.get(name, _Moments()), found.moments.get(first[name], _Moments()).input
        costs[name] = {}
        for text, residual in _residuals(model, codes, name, formats):
            total = 0.0
            if here.output is not None and moment is not None:
                total += float(here.output @ ((residual @ moment) * residual).sum(1)) / here.positions
            if here.rows is not None:
                ids = here.rows[:, 0].long()
                total += float((here.rows[:, 1:] * residual[ids].square()).sum())
            costs[name][text] = 0.5 * total / examples.predicted
        progress(i + 1, len(names), "formats")
    return costs


def token_costs(
    model: FakeQuantModel,
    codes: CodeStore,
    examples: Examples | Tensor,
    formats: Sequence[WeightFormat],
    progress: Progress = silent,
) -> dict[str, dict[str, float]]:
    """Return matrix → format text → ½ Σ_t (g_tᵀ ΔW x_t)² per target, nats per target.

    The empirical Fisher's quadratic form itself, positions taken as independent: no diagonal and no factors are
    assumed, and no moment is stored. Each format costs a product of the size of a forward pass.

    Args:
        model: full precision is set and no LoRA is bound.
        codes: cache of encoded matrices.
        examples: calibration examples, or tokens [blocks, length].
        formats: formats to measure.
        progress: called after each batch.
    """
    examples = Examples.of(examples)
    costs = {name: {str(fmt): 0.0 for fmt in formats} for name in model.checkpoint.matrices.names}

    @torch.no_grad()
    def visit(name: str, x: Tensor, g: Tensor) -> None:
        for text, residual in _residuals(model, codes, name, formats):
            moved = residual[x] if x.dtype == torch.int64 else x @ residual.T
            # An embedding gives K outputs, the residual's row; a linear layer N.
            costs[name][text] += 0.5 * float((g * moved).sum(1).square().sum()) / examples.predicted

    visit_outputs(model, examples, visit, progress)
    return costs
