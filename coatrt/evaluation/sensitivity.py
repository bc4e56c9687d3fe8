"""Sensitivity: what each format would cost each matrix, from one pass of gradients and from the encoded weights."""

from collections.abc import Sequence

from coatrt.data.examples import Examples
from coatrt.evaluation.curvature import token_costs
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.sensitivity_table import Sensitivity
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import relative_error
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.progress import Progress, silent

__all__ = ["measure_sensitivity", "relative_errors"]


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

    A cost is the second-order term of the loss (`coatrt.evaluation.curvature.token_costs`). It ignores how matrices
    interact: a ranking, not a forecast (docs/method.md has its rank correlation with measured losses).

    Args:
        model: it is set to full precision and its LoRA is taken away.
        codes: cache of encoded matrices.
        examples: calibration examples.
        formats: formats to measure.
        progress: called after each batch.
    """
    model.set_config(None)
    model.set_pairs(None)
    costs = token_costs(model, codes, examples, formats, progress)
    return Sensitivity(costs, relative_errors(model, codes, formats, progress))
