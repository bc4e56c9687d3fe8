"""Parameter types and small helpers shared by the commands."""

import json
import re
from typing import Any

import click

__all__ = ["BYTES", "echo_json", "tell_of_gpu"]

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


def tell_of_gpu(compute: str) -> None:
    """Say on standard error that there is a GPU, where the CPU is to compute."""
    import torch

    if compute == "cpu" and torch.cuda.is_available():
        click.echo("coatrt: this runs on the CPU; --compute cuda takes the GPU", err=True)
