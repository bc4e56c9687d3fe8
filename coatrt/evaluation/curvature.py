"""The second-order effect of weight changes on the loss, from the inputs and output gradients of every matrix.

One forward and backward pass hands the inputs x_t of every matrix and the gradients g_t of its outputs to a visitor.
The weights need no gradient, so they are not copied. Sensitivities use the same pass.
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
_TOKENS = 1024  # approximate number per backward pass


def visit_outputs(model: FakeQuantModel, examples: Examples, visit: Visitor, progress: Progress = silent) -> None:
    """Call `visit(matrix name, x, g)` for every matrix and batch of examples.

    x [T, K], float32: inputs at all positions before the last target of their row; for the head only positions that
    predict a target; for the embedding token ids, int64 [T]. g [T, N], float32: gradient of the sum of the batch's
    token losses with respect to the outputs there. A tied table is visited twice under one name, as embedding and head.

    The caller has set the model's configuration and LoRA. `visit` is called during the backward pass and must not keep
    x or g. Progress is reported after each batch, here and below.
    """
    count = 0
    order = examples.last.argsort(stable=True)  # rows of similar length grouped: less padding
    for rows in torch.split(order, max(1, _TOKENS // examples.tokens.shape[1])):
        batch = examples[rows]
        with torch.enable_grad(), _hooked(model, visit, batch):
            (model.loss(batch) * batch.target_count).backward()  # type: ignore[no-untyped-call]
        count += len(rows)
        progress(count, len(examples), "measuring gradients")


@contextmanager
def _hooked(model: FakeQuantModel, visit: Visitor, batch: Examples) -> Iterator[None]:
    is_before_last = torch.arange(batch.tokens.shape[1]) < batch.last[:, None]

    def hook(module: str, name: str) -> Callable[..., Tensor]:
        def forward(_: object, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0].detach()
            if not output.requires_grad:  # the embedding: gradients must flow from here on
                output = output.detach().requires_grad_()

            def backward(gradient: Tensor) -> None:
                # The head may have the positions of targets only; those of other rows have a gradient of exactly zero.
                is_read = is_before_last[:, : gradient.shape[1]].to(gradient.device)
                rows = gradient.any(-1) if module == HEAD else is_read
                visit(name, x[rows] if x.dtype == torch.int64 else x[rows].float(), gradient[rows].float())

            output.register_hook(backward)  # type: ignore[no-untyped-call]
            return output

        return forward

    matrices = model.checkpoint.matrices
    modules = [(m.name, m.name) for m in matrices.matrices]
    if matrices.tied:
        modules.append((HEAD, EMBEDDING))
    with ExitStack() as hooks:
        for module, name in modules:
            hooks.enter_context(model.model.get_submodule(module).register_forward_hook(hook(module, name)))
        yield


def output_gains(model: FakeQuantModel, examples: Examples, progress: Progress = silent) -> dict[str, Tensor]:
    """Return linear matrix → Σ g_n² per target, float32 [N], g the gradient of the summed losses at its outputs.

    The model must have full precision and no LoRA.
    """
    gains: dict[str, Tensor] = {}

    def visit(name: str, x: Tensor, g: Tensor) -> None:
        if x.dtype != torch.int64:
            square = g.square().sum(0) / examples.target_count
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

    This is the quadratic form of the empirical Fisher with positions taken as independent, without a diagonal or
    factored approximation or stored moments. Each format costs as much as the products of a forward pass. The model
    must have full precision and no LoRA; best on other examples than the calibration's.
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
            change = residual[x] if x.dtype == torch.int64 else x @ residual.T
            # An embedding has K outputs, a row of the residual; a linear layer has N.
            sums[name][place] += (g * change).sum(1).square().sum()  # stays on the device: no synchronization

    visit_outputs(model, examples, visit, progress)
    share = 0.5 / examples.target_count
    return {name: dict(zip(texts, (row * share).cpu().tolist(), strict=True)) for name, row in sums.items()}


def relative_errors(
    model: FakeQuantModel, codes: CodeStore, formats: Sequence[WeightFormat], progress: Progress = silent
) -> dict[str, dict[str, float]]:
    """Return matrix → format text → ‖W − Q(W)‖ / ‖W‖ of a model in full precision."""
    errors: dict[str, dict[str, float]] = {}
    names = model.checkpoint.matrices.names
    for i, name in enumerate(names):
        weight = model.weight(name, None)
        errors[name] = {str(fmt): relative_error(weight, codes.get(name, fmt).to(model.compute)) for fmt in formats}
        progress(i + 1, len(names), "measuring errors")
    return errors


def measure_sensitivity(
    model: FakeQuantModel,
    codes: CodeStore,
    examples: Examples,
    formats: Sequence[WeightFormat],
    progress: Progress = silent,
) -> Sensitivity:
    """Measure every matrix in every format.

    A cost is the second-order term of the loss (`token_costs`). It ignores how matrices interact: a ranking, not a
    forecast (docs/evidence/planning.md has its rank correlation with measured losses).

    This sets the model to full precision and removes its LoRA; best on other examples than the calibration's.
    """
    model.set_config(None)
    model.set_pairs(None)
    costs = token_costs(model, codes, examples, formats, progress)
    return Sensitivity(costs, relative_errors(model, codes, formats, progress))
