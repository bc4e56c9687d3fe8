"""Training checkpoints: parameters and AdamW moments in safetensors, the rest in JSON; a run resumes exactly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from coatrt.errors import CheckpointError, ConfigError
from coatrt.system.files import atomic_file, read_json, sha256_file, write_json
from coatrt.training.protocols import LoraModule

__all__ = ["check_state", "claim_state", "has_state", "load_state", "save_state"]

_STATE = "state.json"
_RUN = "run.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    directory: Path, module: LoraModule, optimizer: torch.optim.Optimizer, run: str, progress: Mapping[str, Any]
) -> None:
    """Write a checkpoint; the one before it stays valid until this one is complete.

    Args:
        directory: of the training state, made if missing.
        module: its parameters are saved.
        optimizer: AdamW over exactly these parameters.
        run: identifies options, model and data; `load_state` refuses another.
        progress: "step" (steps done) and whatever else a resumed run needs, as JSON.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        tensors[f"value.{name}"] = parameter.detach().cpu().contiguous()
        for moment in _MOMENTS:
            if moment in optimizer.state[parameter]:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
    file = f"state-{progress['step']}.safetensors"
    with atomic_file(directory / file) as temporary:
        save_file(tensors, str(temporary))
    write_json(
        directory / _STATE,
        {"run": run, "file": file, "sha256": sha256_file(directory / file), "progress": dict(progress)},
    )
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
            _check_run(directory, read_json(directory / name, "training state").get("run"), run)


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


def load_state(
    directory: Path, module: LoraModule, optimizer: torch.optim.Optimizer, run: str
) -> dict[str, Any] | None:
    """Read the last checkpoint into `module` and `optimizer` and return its progress; None where there is none.

    Raises:
        ConfigError: it belongs to other options, another model or other data.
        CheckpointError: it is damaged.
    """
    if not has_state(directory):
        return None
    facts = read_json(directory / _STATE, "training state")
    try:
        _check_run(directory, facts["run"], run)
        path = directory / Path(str(facts["file"])).name
        if sha256_file(path) != facts["sha256"]:
            raise CheckpointError(f"{path} is damaged; start over with --overwrite")
        tensors = load_file(str(path))
        steps = torch.tensor(float(facts["progress"]["step"]))
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(tensors[f"value.{name}"])
                if f"{_MOMENTS[0]}.{name}" in tensors:
                    moments = {m: tensors[f"{m}.{name}"].to(parameter.device) for m in _MOMENTS}
                    optimizer.state[parameter] = {"step": steps.clone(), **moments}
        return dict(facts["progress"])
    except (KeyError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} is damaged ({error}); start over with --overwrite") from None
