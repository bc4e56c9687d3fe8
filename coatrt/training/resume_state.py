"""Training checkpoints: parameters, AdamW moments and history in one safetensors file; a run resumes exactly."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from coatrt.errors import CheckpointError, ConfigError
from coatrt.system.json_data import convert, dump_json, parse_json, read_as, write_json
from coatrt.system.ranges import Measure, Real, Whole
from coatrt.system.tensors import read_tensors, write_tensors
from coatrt.training.objective import Trainable

__all__ = ["History", "check_state", "claim_state", "has_state", "load_state", "save_state"]

_STATE = "state.safetensors"
_RUN = "run.json"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # a parameter that has a gradient in some steps counts its own
_RESTART = "start over with --overwrite"


@dataclass
class History:
    """Steps and losses of a run so far.

    Args:
        step: number of optimizer steps.
        losses: losses of each step, one per configuration, nats per token.
        seconds: duration of training.
    """

    step: Whole = 0
    losses: list[list[Real]] = field(default_factory=list)
    seconds: Measure = 0.0


def save_state(
    directory: Path, module: Trainable, optimizer: torch.optim.Optimizer, run: str, progress: History
) -> None:
    """Write a checkpoint, atomically: the previous one stays until this one is complete.

    Args:
        directory: directory of checkpoints, created if missing.
        module: module whose parameters are saved.
        optimizer: AdamW over exactly these parameters.
        run: identity of options, model and data; `load_state` refuses another.
        progress: steps and losses so far.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        tensors[f"value.{name}"] = parameter
        for moment in _MOMENTS:
            if moment in optimizer.state[parameter]:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    write_tensors(directory / _STATE, tensors, {"run": run, "progress": dump_json(progress)})


def check_state(directory: Path, run: str) -> None:
    """Refuse a directory that holds the training state of another run.

    Raises:
        ConfigError: it belongs to other options, another model or other data.
    """
    if (directory / _RUN).is_file():
        state = read_as(directory / _RUN, dict[str, Any], "training state", _RESTART, sealed=True)
        _check_run(directory, state.get("run"), run)


def claim_state(directory: Path, run: str) -> None:
    """Mark a directory as the state of a run, and remove sensitivities if it was not marked before.

    Raises:
        ConfigError: it belongs to other options, another model or other data.
    """
    check_state(directory, run)
    if not (directory / _RUN).is_file():
        (directory / "sensitivity.json").unlink(missing_ok=True)
        write_json(directory / _RUN, {"run": run}, sealed=True)


def _check_run(directory: Path, saved_run: object, run: str) -> None:
    if saved_run != run:
        raise ConfigError(
            f"{directory} holds a training with other options, another model or other data; resume with the same "
            "ones, or start over with --overwrite"
        )


def has_state(directory: Path) -> bool:
    """Return whether there is a checkpoint."""
    return (directory / _STATE).is_file()


def load_state(directory: Path, module: Trainable, optimizer: torch.optim.Optimizer, run: str) -> History | None:
    """Read the last checkpoint into `module` and `optimizer` and return its history; None without a checkpoint.

    Raises:
        ConfigError: it belongs to other options, another model or other data.
        CheckpointError: it is damaged.
    """
    if not has_state(directory):
        return None
    entry = read_tensors(directory / _STATE)
    if entry is None:
        raise CheckpointError(f"{directory / _STATE} is damaged; {_RESTART}")
    tensors, metadata = entry
    _check_run(directory, metadata.get("run"), run)
    where = f"the progress in {directory / _STATE}"
    value = parse_json(metadata.get("progress", ""), where, _RESTART, CheckpointError)
    progress = convert(value, History, where, _RESTART, CheckpointError)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[f"value.{name}"])
            if f"{_MOMENTS[0]}.{name}" in tensors:
                state = {m: tensors[f"{m}.{name}"] for m in _MOMENTS}
                moved = {m: tensor if m == "step" else tensor.to(parameter.device) for m, tensor in state.items()}
                optimizer.state[parameter] = moved
    return progress
