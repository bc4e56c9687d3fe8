"""How many builders run at once: single-threaded processes, as many as there are cores and memory for."""

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
    """Return the memory to set aside for a builder of so many bytes of weights.

    Peaks of TensorRT-RTX 1.7.1 on SmolLM2-135M are 0.93 GB for 93 MB of weights in both forms of the graph; the slope
    is a margin, not a fit.
    """
    return _BUILDER_BASE + int(_PER_WEIGHT_BYTE * weights)


class BuilderSlots:
    """Lets builders in while there are cores and memory; one is always let in.

    Args:
        jobs: most builders at once; by default the usable cores.
        memory: bytes for all of them; by default 70 % of what is free.

    Raises:
        ConfigError: a number is not positive.
    """

    def __init__(self, jobs: int | None = None, memory: int | None = None) -> None:
        self.jobs = usable_cores() if jobs is None else jobs
        self.memory = int(0.7 * free_memory()) if memory is None else memory
        if self.jobs < 1 or self.memory < 1:
            raise ConfigError(f"jobs and build memory must be at least 1, got {jobs} and {memory}")
        self._inside: list[int] = []
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Wait until a builder of `size` bytes may run, and hold its place meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: not self._inside or self._fits(size))
            self._inside.append(size)
        try:
            yield
        finally:
            with self._changed:
                self._inside.remove(size)
                self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return len(self._inside) < self.jobs and sum(self._inside) + size <= self.memory
