"""Limits how many builders run at once: they are single-threaded processes, limited by cores and memory."""

import contextlib
import threading
from collections.abc import Iterator

from coatrt.devices.environment import usable_cores
from coatrt.errors import ConfigError
from coatrt.system.resources import free_memory

__all__ = ["BuilderSlots", "builder_bytes"]

_BUILDER_BASE = 700 << 20
_PER_WEIGHT_BYTE = 4.0


def builder_bytes(weights: int) -> int:
    """Return the memory to reserve for a builder, in bytes, given the bytes of its weights.

    TensorRT-RTX 1.7.1 on SmolLM2-135M peaks at 0.93 GB for 93 MB of weights; the slope is a safety margin, not a fit.
    """
    return _BUILDER_BASE + int(_PER_WEIGHT_BYTE * weights)


class BuilderSlots:
    """Admits builders while there are cores and memory; one builder is always admitted.

    Args:
        jobs: largest number of builders at once; by default the usable cores.
        memory: bytes for all builders together; by default 70 % of the free memory.

    Raises:
        ConfigError: a number is below 1.
    """

    def __init__(self, jobs: int | None = None, memory: int | None = None) -> None:
        self.jobs = usable_cores() if jobs is None else jobs
        self.memory = int(0.7 * free_memory()) if memory is None else memory
        if self.jobs < 1 or self.memory < 1:
            raise ConfigError(f"jobs and build memory must be at least 1, got {jobs} and {memory}")
        self._sizes: list[int] = []  # of the running builders
        self._condition = threading.Condition()

    @contextlib.contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Wait until a builder of `size` bytes may run; its slot is freed at the end of the with block."""
        with self._condition:
            self._condition.wait_for(lambda: not self._sizes or self._fits(size))
            self._sizes.append(size)
        try:
            yield
        finally:
            with self._condition:
                self._sizes.remove(size)
                self._condition.notify_all()

    def _fits(self, size: int) -> bool:
        return len(self._sizes) < self.jobs and sum(self._sizes) + size <= self.memory
