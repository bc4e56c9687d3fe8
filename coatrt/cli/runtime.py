"""The options of every command that runs a bundle, made from `RuntimeOptions`."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from coatrt.engines.runtime.options import RuntimeOptions

__all__ = ["runtime_options"]

F = TypeVar("F", bound=Callable[..., Any])

_DEFAULT = RuntimeOptions()
_OPTIONS = {
    "backend": click.option(
        "--backend",
        type=click.Choice(["ort", "trt"]),
        default=_DEFAULT.backend,
        show_default=True,
        help="ONNX Runtime on the CPU, or the bundle's engine on this machine's GPU.",
    ),
    "batch": click.option("--batch", type=int, default=_DEFAULT.batch, show_default=True, help="Sequences at once."),
    "context": click.option(
        "--context", type=int, default=_DEFAULT.context, show_default=True, help="Slots of the KV cache (ort)."
    ),
    "threads": click.option("--threads", type=int, help="Threads (ort).  [default: all usable cores]"),
    "accuracy_level": click.option(
        "--accuracy-level",
        type=click.Choice(["0", "1", "4"]),
        default=str(_DEFAULT.accuracy_level),
        show_default=True,
        callback=lambda _, __, value: int(value),
        help="Of int4 and int8 products (ort): 0 decodes at load, exact; 1 packed, exact and slow; 4 packed, fastest.",
    ),
}


def runtime_options(*names: str) -> Callable[[F], F]:
    """Return a decorator that adds the named options of `RuntimeOptions` to a command."""

    def decorate(command: F) -> F:
        for name in reversed(names):
            command = _OPTIONS[name](command)
        return command

    return decorate
