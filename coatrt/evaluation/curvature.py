"""What changing a weight does to the loss, to second order, seen at the inputs and outputs of every matrix.

One pass of forward and backward hands every matrix's inputs x_t and the gradients g_t of its outputs to a visitor; the
weights themselves need no gradient, so no copy of them is made. Sensitivities come from the same pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from coatrt.data.examples import Examples
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.sensitivity_table import Sensitivity
from coatrt.models.matrices import EMBEDDING, HEAD
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode, relative_error
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.progress import Progress, silent

__all__ = ["measure_sensitivity", "output_gains", "relative_errors", "token_costs", "visit_outputs"]

Visitor = Callable[[str, Tensor, Tensor], None]
_TOKENS = 1024  # of a backward pass, about


def visit_outputs(model: FakeQuantModel, examples: Examples, visit: Visitor, progress: Progress = silent) -> None:
    """Call `visit(matrix name, x, g)` for every matrix and batch of examples.

    x [T, K]: the inputs at all positions before the last target of their row, of the head those that predict a target
    (int64 [T] token ids for the embedding); g [T, N]: the gradient of the sum of the batch's token losses with respect
    to the outputs there; both float32. A tied table is visited twice, as embedding and as head, under its one name.

    The model's configuration and LoRA are already set. `visit` is called during the backward pass and must not keep x
    or g; progress is reported after each batch, here and below.
    """
    done = 0
    order = examples.last.argsort(stable=True)  # rows of similar length grouped: less padding
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
    with ExitStack() as hooks:
        for module, name in taps:
            hooks.enter_context(model.model.get_submodule(module).register_forward_hook(tap(module, name)))
        yield


def output_gains(model: FakeQuantModel, examples: Examples, progress: Progress = silent) -> dict[str, Tensor]:
    """Return linear matrix → Σ g_n² per target, float32 [N], g the gradients of the summed losses at the outputs.

    The model has full precision and no LoRA bound; the examples are those of the calibration.
    """
    gains: dict[str, Tensor] = {}

    def visit(name: str, x: Tensor, g: Tensor) -> None:
        if x.dtype != torch.int64:
            square = g.square().sum(0) / examples.predicted
            gains[name] = gains[name] + square if name in gains else square

    visit_outputs(model, examples, visit, progress)
    return gains


def token_costs(
    model: FakeQuantModel,
    codes: CodeStore,
    examples: Examples,
    formats: Sequence[WeightFormat],
    progress: Progress = silent,
) -> dict[str, dict[str, float]]:
    """Return matrix → format text → ½ Σ_t (g_tᵀ ΔW x_t)² per target, nats per target.

    The empirical Fisher's quadratic form itself, positions taken as independent: no diagonal and no factors are
    assumed, and no moment is stored. Each format costs a product of the size of a forward pass. The model has full
    precision and no LoRA bound; the examples are those of the calibration.
    """
    texts = [str(fmt) for fmt in formats]
    sums = {
        name: torch.zeros(len(texts), dtype=torch.float64, device=model.compute)
        for name in model.checkpoint.matrices.names
    }

    @torch.no_grad()
    def visit(name: str, x: Tensor, g: Tensor) -> None:
        weight = model.weight(name, None)
        for place, fmt in enumerate(formats):
            residual = weight - decode(codes.get(name, fmt).to(model.compute))
            moved = residual[x] if x.dtype == torch.int64 else x @ residual.T
            # An embedding gives K outputs, the residual's row; a linear layer N.
            sums[name][place] += (g * moved).sum(1).square().sum()  # on the device, which nobody waits for here

    visit_outputs(model, examples, visit, progress)
    share = 0.5 / examples.predicted
    return {name: dict(zip(texts, (row * share).cpu().tolist(), strict=True)) for name, row in sums.items()}


def relative_errors(
    model: FakeQuantModel, codes: CodeStore, formats: Sequence[WeightFormat], progress: Progress = silent
) -> dict[str, dict[str, float]]:
    """Return matrix → format text → ‖W − Q(W)‖ / ‖W‖ of a model at full precision."""
    errors: dict[str, dict[str, float]] = {}
    names = model.checkpoint.matrices.names
    for i, name in enumerate(names):
        weight = model.weight(name, None)
        errors[name] = {str(fmt): relative_error(weight, codes.get(name, fmt).to(model.compute)) for fmt in formats}
        progress(i + 1, len(names), "errors")
    return errors


def measure_sensitivity(
    model: FakeQuantModel,
    codes: CodeStore,
    examples: Examples,
    formats: Sequence[WeightFormat],
    progress: Progress = silent,
) -> Sensitivity:
    """Measure every matrix in every format.

    A cost is the second-order term of the loss (`token_costs`). It ignores how matrices
    interact: a ranking, not a forecast (docs/method.md has its rank correlation with measured losses).

    The model is set to full precision and its LoRA is taken away; the examples are those of the calibration.
    """
    model.set_config(None)
    model.set_pairs(None)
    costs = token_costs(model, codes, examples, formats, progress)
    return Sensitivity(costs, relative_errors(model, codes, formats, progress))
