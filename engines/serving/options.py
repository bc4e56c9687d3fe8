"""How a server runs."""

from dataclasses import dataclass, field

from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.errors import ConfigError

__all__ = ["ServeOptions"]


@dataclass(frozen=True)
class ServeOptions:
    """How a server runs.

    Args:
        runtime: backend, context and accuracy level. `batch` is the number of sequences of each bundle that are
            computed at once. `threads` are those of one step, 1 by default: as many steps run beside each other as
            there are cores. Only with 1 is an answer independent of what else is computed, bit for bit.
        api_key: what clients must send; None for no key.
        queue: requests that may wait; more are refused.
        time_limit: seconds that a request may take, from its arrival to its end.
        grace: seconds that running requests get to end when the server stops.

    Raises:
        ConfigError: a number is out of range, or the key is empty.
    """

    runtime: RuntimeOptions = field(default_factory=lambda: RuntimeOptions(batch=8))
    api_key: str | None = None
    queue: int = 64
    time_limit: float = 600.0
    grace: float = 5.0

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip() == self.api_key != ""):
            raise ConfigError("the API key must be ASCII characters without spaces around them; give another one")
        if not 0 <= self.queue <= 100_000:
            raise ConfigError(f"queue must be a whole number from 0 to 100000, got {self.queue}")
        for name, least in (("time_limit", 0.001), ("grace", 0.0)):
            value = getattr(self, name)
            if not least <= value <= 86400:
                raise ConfigError(f"{name} must be a number of seconds up to 86400, got {value}")
