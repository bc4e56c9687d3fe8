"""Data-parallel processes, each with its share of a batch (Accelerate); a single process does not import it."""

import atexit
import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from coatrt.errors import ConfigError

__all__ = ["Processes"]

_TIMEOUT = timedelta(days=1)  # others wait while the first encodes a large model; NCCL's default is 10 minutes


class Processes:
    """The processes that `accelerate launch` or `torchrun` started; only this one without them.

    Args:
        device: torch device type that trains, "cpu" or "cuda".
    """

    def __init__(self, device: str = "cpu") -> None:
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=device == "cpu", timeout=_TIMEOUT)
            # Gloo's threads must be joined before the interpreter exits, or the process sometimes ends in abort().
            atexit.register(self._state.destroy_process_group)

    @property
    def count(self) -> int:
        """Number of processes."""
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
            raise ConfigError(f"the batch must be a multiple of the {self.count} processes, got {len(rows)}")
        return rows[self._state.process_index :: self.count] if self._state is not None else rows

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum every gradient over all processes; a missing gradient counts as zero."""
        if self.count > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)

    @torch.no_grad()
    def copy_from_first(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy the first process's values to all: results computed in each may differ in the last bits."""
        if self.count > 1:
            for parameter in parameters:
                torch.distributed.broadcast(parameter, 0)

    def sum(self, values: Tensor) -> list[float]:
        """Return numbers [n] summed over all processes; `values` may be overwritten."""
        if self.count > 1:
            torch.distributed.all_reduce(values)
        sums: list[float] = values.cpu().tolist()
        return sums

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self._state is not None:
            self._state.wait_for_everyone()
