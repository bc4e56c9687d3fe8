"""The options of `coatrt train` that are fields of `TrainOptions`, made from them."""

from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from coatrt.training.options import TrainOptions

__all__ = ["train_options"]


class _Commas(click.ParamType[tuple[Any, ...]]):
    """Values with commas between them.

    Args:
        name: shown in the help, such as B,B,….
        read: text → value; raises ValueError for others.
        example: shown where a text is refused.
    """

    def __init__(self, name: str, read: Callable[[str], Any], example: str) -> None:
        self.name, self._read, self._example = name, read, example

    def convert(
        self, value: str | tuple[Any, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._read(part) for part in value.split(",") if part)
        except ValueError:
            self.fail(f"{value!r} cannot be read; separate values with commas, like {self._example}", param, ctx)


def _rank(text: str) -> tuple[str, int]:
    kind, rank = text.split("=")
    return kind, int(rank)


_LISTS = {
    "formats": _Commas("F,F,…", str, "nf3-g64,int8"),
    "ranks": _Commas("KIND=R,…", _rank, "down_proj=32,o_proj=32"),
    "budgets": _Commas("B,B,…", float, "4,5,6"),
}


def train_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for each field of `TrainOptions`, named as the field is."""
    kinds = get_type_hints(TrainOptions)
    for field in reversed(fields(TrainOptions)):
        command = _option(field, kinds[field.name])(command)
    return command


def _option(field: "Field[Any]", kind: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    flag, help, default = "--" + field.name.replace("_", "-"), field.metadata["help"], field.default
    short = ["--length"] if field.name == "max_length" else []
    if kind is bool:
        flags = f"{flag}/--no-{field.name}" if default else flag
        return click.option(flags, is_flag=True, default=default, show_default=default, help=help)
    if isinstance(default, tuple):
        default = ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in default)
    shown = field.metadata["unset"] or default != ""
    return click.option(flag, *short, type=_type(field, kind), default=default, show_default=shown, help=help)


def _type(field: "Field[Any]", kind: Any) -> click.ParamType[Any]:
    """Return the type of an option, with the limits of the field."""
    least, above = field.metadata["least"], field.metadata["above"]
    if field.name in _LISTS:
        return _LISTS[field.name]
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if int in (kind, *get_args(kind)):
        return click.IntRange(min=least)
    return click.FLOAT if above is None else click.FloatRange(min=above, min_open=True)
