"""Parameters and small helpers shared by the commands."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from coatrt.engines.runtime.options import Backend, RuntimeOptions
from coatrt.errors import ConfigError

__all__ = [
    "ACTIVATIONS",
    "BYTES",
    "CPU_ACTIVATIONS",
    "DATA",
    "DEVICE",
    "JSON",
    "MODEL",
    "PATH",
    "SAMPLING",
    "SIGN",
    "TARGETS",
    "check_writable",
    "echo_json",
    "lora_options",
    "runtime_options",
    "sampling_options",
    "trust_options",
    "warn_of_idle_gpu",
    "with_options",
]

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


class _Bytes(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]{0,3})\s*", str(value), re.ASCII)
        if match is None or match[2].upper() not in _UNITS:
            shown = f"{str(value)[:40]!r}"
            self.fail(f"not a size: {shown}; give a number and GiB, MiB, GB or MB, like 6GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2].upper()])


BYTES = _Bytes()
"""A number of bytes with an optional unit: 6GiB, 800MB."""

PATH = click.Path(path_type=Path)
MODEL = click.option("--model", help="The model's path or hub name.  [default: the one trained on]")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
DATA = click.option(
    "--data",
    multiple=True,
    required=True,
    metavar="PATH",
    help="Text file or directory of *.txt (chat, choice: *.jsonl); repeatable.",
)
TARGETS = click.option(
    "--target",
    "devices",
    multiple=True,
    required=True,
    metavar="DEVICE",
    help="Device to plan for, such as rtx-4060 (see coatrt devices); repeatable.",
)
DEVICE = click.option("--device", default="cpu", metavar="DEVICE", help="torch device, such as cpu or cuda.")
"""Where train and search compute."""

ACTIVATIONS = click.option(
    "--activations",
    type=click.Choice(["float16", "bfloat16"]),
    default="float16",
    help="Type of the activations on a GPU.",
)
CPU_ACTIVATIONS = click.option(
    "--cpu-activations",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    help="Type of the activations on the CPU.",
)

SIGN = click.option("--sign", type=PATH, help="Sign the bundle with this private key, a PEM file (P-256).")

_DEFAULT = RuntimeOptions()
_RUNTIME = {
    "backend": click.option(
        "--backend",
        type=click.Choice(get_args(Backend)),
        default=_DEFAULT.backend,
        help="ort: ONNX Runtime on the CPU; cuda: ONNX Runtime on the GPU; trt: the bundle's TensorRT engine.",
    ),
    "batch": click.option("--batch", type=int, default=_DEFAULT.batch, help="Sequences decoded together."),
    "context": click.option(
        "-c",
        "--context",
        type=int,
        default=_DEFAULT.context,
        help="Tokens that the KV cache holds, prompt included (ort, cuda).",
    ),
    "threads": click.option("-t", "--threads", type=int, help="Threads (ort).  [default: all usable cores]"),
    "accuracy_level": click.option(
        "--accuracy-level",
        type=click.Choice(["0", "1", "4"]),
        default=str(_DEFAULT.accuracy_level),
        callback=lambda _, __, value: int(value),
        help="int4 and int8 products (ort): 0 is exact and decodes the weights at load, 1 is exact, packed and slow, "
        "4 is packed and fastest.",
    ),
}


def with_options(*added: Callable[[Any], Any]) -> Callable[[F], F]:
    """Return a decorator that adds click options to a command, in the order of its help."""

    def decorate(command: F) -> F:
        for add in reversed(added):
            command = add(command)
        return command

    return decorate


trust_options = with_options(
    click.option("--key", type=PATH, help="Public key, a PEM file: check that it signed the bundle."),
    click.option(
        "--signature",
        type=click.Choice(["off", "warn", "require"]),
        help="Refuse an unsigned bundle, warn, or do not check.  [default: require with --key, else off]",
    ),
)
"""Whose bundles are trusted, for a command that opens one: arguments `key` and `policy` of `Bundle.open`."""


lora_options = with_options(
    click.option("--lora", type=PATH, help="Use another LoRA file (see coatrt adapt) with the same weights."),
    click.option("--strict-lora", is_flag=True, help="Refuse a LoRA made for another configuration."),
    click.option("--no-lora", is_flag=True, help="Run the quantized weights without a LoRA."),
)
"""Which LoRA a command runs a bundle with."""

sampling_options = with_options(
    click.option("--temperature", "--temp", type=float, default=0.0, help="0 takes the likeliest token."),
    click.option("--top-k", type=int, default=0, help="Sample among the k likeliest tokens; 0: among all."),
    click.option(
        "--top-p", type=float, default=1.0, help="Sample among the likeliest tokens of this total probability."
    ),
    click.option(
        "--min-p", type=float, default=0.0, help="Sample among tokens this many times as likely as the likeliest."
    ),
    click.option("--repetition-penalty", type=float, default=1.0, help="Above 1: tokens seen before are less likely."),
    click.option("--presence-penalty", type=float, default=0.0, help="Subtracted from logits of generated tokens."),
    click.option(
        "--frequency-penalty", type=float, default=0.0, help="Subtracted once for each time a token was generated."
    ),
    click.option("--seed", type=int, default=0, help="Seed of the sampling."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text, which is not shown; repeatable."),
)
"""Fields of `Sampling`, and stop strings."""

SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed"),
)
"""The fields of `Sampling` among them."""


def runtime_options(*names: str) -> Callable[[F], F]:
    """Return a decorator that adds the named options of `RuntimeOptions` to a command that runs a bundle."""
    return with_options(*(_RUNTIME[name] for name in names))


def echo_json(value: object) -> None:
    """Print `value` as JSON in ASCII, which a stream of any encoding can hold."""
    from coatrt.system.json_data import dump_json

    click.echo(re.sub(r"[^\x00-\x7f]", lambda match: json.dumps(match[0])[1:-1], dump_json(value)))


def check_writable(path: Path) -> None:
    """Refuse an output file that cannot be written, before the work whose result goes there.

    Raises:
        ConfigError: it is a directory, or its directory is not writable.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a directory; give the name of a file")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ConfigError(f"{path} cannot be written: {parent} is not a writable directory; give another path")


def warn_of_idle_gpu(device: str) -> None:
    """Warn on standard error that a GPU is idle."""
    import torch

    if device == "cpu" and torch.cuda.is_available():
        click.echo("coatrt: running on the CPU while a GPU is idle; --device cuda uses it", err=True)
