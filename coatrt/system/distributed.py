"""Several processes, each with its share of a batch (Accelerate); one process needs nothing of it."""

import atexit
import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from coatrt.errors import ConfigError

__all__ = ["Processes"]

_PATIENCE = timedelta(days=1)  # the others wait while the first encodes a large model; NCCL's own limit is 10 minutes


class Processes:
    """This process among those that `accelerate launch` or `torchrun` started; alone without them.

    Args:
        device: torch device type that trains, "cpu" or "cuda".
    """

    def __init__(self, device: str = "cpu") -> None:
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=device == "cpu", timeout=_PATIENCE)
            # Gloo's threads must be joined before the interpreter is gone, or now and then the process ends in abort().
            atexit.register(self._state.destroy_process_group)

    @property
    def count(self) -> int:
        """Processes in all."""
        return int(self._state.num_processes) if self._state is not None else 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return bool(self._state.is_main_process) if self._state is not None else True

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's rows of a batch.

        Raises:
            ConfigError: the batch does not divide evenly.
        """
        if len(rows) % self.count:
            raise ConfigError(
                f"a batch of {len(rows)} does not divide among {self.count} processes; give a multiple of {self.count}"
            )
        return rows[self._state.process_index :: self.count] if self._state is not None else rows

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make every gradient the sum over all processes; a parameter without one counts as zero."""
        if self.count > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)

    @torch.no_grad()
    def copy_from_first(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every process the first one's values: what was computed in each may differ in its last bits."""
        if self.count > 1:
            for parameter in parameters:
                torch.distributed.broadcast(parameter, 0)

    def sum(self, values: Tensor) -> list[float]:
        """Return numbers [n] summed over all processes; they may be overwritten."""
        if self.count > 1:
            torch.distributed.all_reduce(values)
        found: list[float] = values.cpu().tolist()
        return found

    def wait(self) -> None:
        """Wait until every process is here."""
        if self._state is not None:
            self._state.wait_for_everyone()
