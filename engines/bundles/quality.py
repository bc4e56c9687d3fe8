"""What a bundle is worth on held-out data: its own weights in torch, without and with its own LoRA."""

from dataclasses import replace
from pathlib import Path

import torch

from coatrt.bundle import Bundle
from coatrt.data.task_data import TaskData
from coatrt.engines.bundles.stored_weights import stored_weights
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.errors import CheckpointError, ConfigError
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import measure_held_out
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.code_cache import CodeStore
from coatrt.reporting.measured import Quality
from coatrt.system.progress import Progress, silent

__all__ = ["measure_quality", "sampled"]


def sampled(data: TaskData, examples: int) -> TaskData:
    """Return data with at most so many held-out examples, spread over all of them; of questions the first ones.

    Raises:
        ConfigError: less than one.
    """
    if examples < 1:
        raise ConfigError(f"examples must be at least 1, got {examples}")
    if data.choices is not None:
        return replace(data, choices=data.choices.first(examples), held_out=data.held_out[:examples])
    count = min(examples, len(data.held_out))
    return replace(data, held_out=data.held_out[torch.linspace(0, len(data.held_out) - 1, count).round().long()])


def measure_quality(
    bundle: Bundle, data: TaskData, *, model: str | Path | None = None, progress: Progress = silent
) -> Quality:
    """Measure the weights of a bundle on held-out data, with the original for comparison.

    Args:
        bundle: an opened bundle.
        data: its held-out examples are measured on, see `sampled`.
        model: the bundle's model, where it is not at the place the bundle remembers.
        progress: called after each of the three measurements.

    Raises:
        CheckpointError: the model is not there, or is not the bundle's.
        BundleError: the bundle is damaged.
        ConfigError: the data hold a token that the model has no row for.
    """
    facts = bundle.manifest["model"]
    checkpoint = Checkpoint.open(model if model is not None else facts["source"])
    if checkpoint.fingerprint != facts["fingerprint"]:
        raise CheckpointError(
            f"{checkpoint.directory} has the fingerprint {checkpoint.fingerprint}, the bundle was made from "
            f"{facts['fingerprint']}; give the bundle's model (--model)"
        )
    data.check_rows(bundle.model_matrices.matrices[0].N)
    reference = FakeQuantModel(checkpoint, CodeStore(checkpoint))
    scores = []

    def measure() -> None:
        scores.append(measure_held_out(reference, data))
        progress(len(scores), 3, "measuring quality")

    measure()
    held = stored_weights(bundle.decoder("cpu")[0], bundle.model_matrices)
    reference.set_weights((name, torch.from_numpy(weight.copy())) for name, weight in held)
    measure()
    lora = load_lora(bundle.path("lora.safetensors"), bundle.contract)
    reference.set_lora(bundle.contract, {name: torch.from_numpy(value.copy()) for name, value in lora.items()})
    measure()
    return Quality.of(data, *scores)
