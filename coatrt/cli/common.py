"""Parameter types and small helpers shared by the commands."""

import json
import os
import re
from pathlib import Path
from typing import Any

import click

from coatrt.errors import ConfigError

__all__ = ["BYTES", "check_writable", "echo_json", "tell_of_gpu"]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


class _Bytes(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
        if match is None or match[2].upper() not in _UNITS:
            self.fail(f"{value!r} is no size; give a number with GiB, MiB, GB or MB, like 6GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2].upper()])


BYTES = _Bytes()
"""A number of bytes with an optional unit: 6GiB, 800MB."""


def echo_json(value: Any) -> None:
    """Print `value` as JSON."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold.

    Raises:
        ConfigError: a directory, or a place that cannot be written to.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a directory; give the name of a file")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ConfigError(f"{path} cannot be written, {parent} is no directory open for writing; give another place")


def tell_of_gpu(compute: str) -> None:
    """Say on standard error that there is a GPU, where the CPU is to compute."""
    import torch

    if compute == "cpu" and torch.cuda.is_available():
        click.echo("coatrt: this runs on the CPU; --compute cuda takes the GPU", err=True)
