"""Training checkpoints: parameters and AdamW moments in safetensors, the rest in JSON; a run resumes exactly."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from coatrt.errors import CheckpointError, ConfigError
from coatrt.system.files import atomic_file, sha256_file
from coatrt.system.json_data import read_as, write_json
from coatrt.training.options import TrainOptions
from coatrt.training.protocols import LoraModule

__all__ = ["History", "check_state", "claim_state", "has_state", "load_state", "save_state"]

_STATE = "state.json"
_RUN = "run.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_RESTART = "start over with --overwrite"


@dataclass
class History:
    """What a run has done so far.

    Args:
        step: optimizer steps.
        losses: per step, the task's loss under each of its configurations, nats per token.
        seconds: of training, measurements included.
        measured: (steps done, figure of merit), for early stopping.
    """

    step: int = 0
    losses: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    measured: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> int:
        """Steps done at the highest figure of merit; -1 where none was measured."""
        return max(self.measured, key=lambda row: row[1])[0] if self.measured else -1

    def exhausted(self, patience: int) -> bool:
        """Return whether so many measurements in a row were no better than the best before them."""
        return patience > 0 and sum(step > self.best for step, _ in self.measured) >= patience

    def ends(self, options: TrainOptions) -> bool:
        """Return whether training is over: every step is done, or patience is exhausted."""
        return self.step >= options.steps or self.exhausted(options.patience)


@dataclass(frozen=True)
class _State:
    """A checkpoint: the run it belongs to, its tensors' file with its hash, and the progress."""

    run: str
    file: str
    sha256: str
    progress: History


def save_state(
    directory: Path, module: LoraModule, optimizer: torch.optim.Optimizer, run: str, progress: History
) -> None:
    """Write a checkpoint; the one before it stays valid until this one is complete.

    Args:
        directory: of the training state, made if missing.
        module: its parameters are saved.
        optimizer: AdamW over exactly these parameters.
        run: identifies options, model and data; `load_state` refuses another.
        progress: what else a resumed run needs.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        tensors[f"value.{name}"] = parameter.detach().cpu().contiguous()
        for moment in _MOMENTS:
            if moment in optimizer.state[parameter]:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
    file = f"state-{progress.step}.safetensors"
    with atomic_file(directory / file) as temporary:
        save_file(tensors, str(temporary))
    write_json(directory / _STATE, _State(run, file, sha256_file(directory / file), progress))
    for old in directory.glob("state-*.safetensors"):
        if old.name != file:
            old.unlink()


def check_state(directory: Path, run: str) -> None:
    """Refuse a directory that holds the training state of another run.

    Raises:
        ConfigError: it belongs to other options, another model or other data.
    """
    for name in (_RUN, _STATE):
        if (directory / name).is_file():
            _check_run(directory, read_as(directory / name, dict[str, Any], "training state", _RESTART).get("run"), run)


def claim_state(directory: Path, run: str) -> None:
    """Make a directory the training state of a run; sensitivities that nothing says to be this run's are removed.

    Raises:
        ConfigError: it belongs to other options, another model or other data.
    """
    check_state(directory, run)
    if not (directory / _RUN).is_file():
        (directory / "sensitivity.json").unlink(missing_ok=True)
        write_json(directory / _RUN, {"run": run})


def _check_run(directory: Path, found: object, run: str) -> None:
    if found != run:
        raise ConfigError(
            f"{directory} holds a training with other options, another model or other data; resume with the same "
            "ones, or start over with --overwrite"
        )


def has_state(directory: Path) -> bool:
    """Return whether a checkpoint has been written."""
    return (directory / _STATE).is_file()


def load_state(directory: Path, module: LoraModule, optimizer: torch.optim.Optimizer, run: str) -> History | None:
    """Read the last checkpoint into `module` and `optimizer` and return its progress; None where there is none.

    Raises:
        ConfigError: it belongs to other options, another model or other data.
        CheckpointError: it is damaged.
    """
    if not has_state(directory):
        return None
    state = read_as(directory / _STATE, _State, "training state", _RESTART, CheckpointError)
    _check_run(directory, state.run, run)
    path = directory / Path(state.file).name
    try:
        if sha256_file(path) != state.sha256:
            raise CheckpointError(f"{path} is damaged; {_RESTART}")
        tensors = load_file(str(path))
        steps = torch.tensor(float(state.progress.step))
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(tensors[f"value.{name}"])
                if f"{_MOMENTS[0]}.{name}" in tensors:
                    moments = {m: tensors[f"{m}.{name}"].to(parameter.device) for m in _MOMENTS}
                    optimizer.state[parameter] = {"step": steps.clone(), **moments}
        return state.progress
    except (KeyError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} is damaged ({error}); {_RESTART}") from None
