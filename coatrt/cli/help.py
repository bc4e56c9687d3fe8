"""Help texts: what a command does, examples, the options used most, then all others."""

from collections.abc import Callable, Sequence
from typing import Any

import click

__all__ = ["Command", "Group", "Option", "documented", "write_examples"]


def write_examples(examples: Sequence[str], formatter: click.HelpFormatter) -> None:
    """Write command lines as a section, unwrapped, so that they can be copied."""
    if examples:
        with formatter.section("Examples"):
            for line in examples:
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Option(click.Option):
    """An option whose help shows its default, but not its range: an error names that."""

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Return the parts in brackets after the help."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra


class Command(click.Command):
    """A command with examples and with its most used options first.

    Args:
        examples: command lines that work as written.
        first: names of the parameters whose options come first, in this order; empty: one list of all options.
        terms: (title, ((term, explanation), …)) of a section at the end.
    """

    def __init__(
        self,
        *args: Any,
        examples: Sequence[str] = (),
        first: Sequence[str] = (),
        terms: tuple[str, Sequence[tuple[str, str]]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.examples, self._first, self._terms = tuple(examples), tuple(first), terms
        for parameter in self.params:
            if isinstance(parameter.type, click.IntRange | click.FloatRange) and parameter.metavar is None:
                parameter.metavar = parameter.type.name.removesuffix(" range").upper()
        unknown = set(first) - {parameter.name for parameter in self.params}
        assert not unknown, f"{self.name} has no option {', '.join(unknown)}"

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what the command does, and the examples."""
        super().format_help_text(ctx, formatter)
        write_examples(self.examples, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options used most, then all others, then the terms."""
        options = [option for option in self.get_params(ctx) if isinstance(option, click.Option)]
        place = {name: i for i, name in enumerate(self._first)}
        most_used = sorted((option for option in options if option.name in place), key=lambda o: place[o.name or ""])
        others = [option for option in options if option.name not in place]
        if not most_used:
            most_used, others = others, []
        for title, group in (("Options", most_used), ("More options", others)):
            records = [record for option in group if (record := option.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
        if self._terms is not None:
            with formatter.section(self._terms[0]):
                formatter.write_dl(list(self._terms[1]))


class Group(click.Group):
    """A group of commands with examples.

    Args:
        examples: command lines that work as written.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what the commands do, and the examples."""
        super().format_help_text(ctx, formatter)
        write_examples(self.examples, formatter)


def documented(
    *,
    examples: Sequence[str],
    first: Sequence[str] = (),
    terms: tuple[str, Sequence[tuple[str, str]]] | None = None,
) -> Callable[[Callable[..., Any]], Command]:
    """Return a decorator that makes a function a `Command` with these arguments."""
    return click.command(cls=Command, examples=examples, first=first, terms=terms)
