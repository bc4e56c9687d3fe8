"""Writes docs/reference/cli.md from the commands; with --check, exits with 1 if the page differs from --help."""

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from coatrt.cli.main import cli

__all__ = ["PAGE", "commands", "page"]

PAGE = Path(__file__).resolve().parent / "reference" / "cli.md"
_WIDTH = 78  # what click uses in a terminal of 80 columns

_HEAD = """# Command line

What `--help` shows of each command. `python docs/cli_reference.py` writes this page; a test compares the two.
"""


def commands(command: click.Command = cli, path: str = "coatrt") -> Iterator[tuple[str, click.Command]]:
    """Yield the path and the object of a command and of all commands below it, in the order of the help."""
    yield path, command
    if isinstance(command, click.Group):
        with click.Context(command, info_name=path) as context:
            for name in command.list_commands(context):
                below = command.get_command(context, name)
                assert below is not None
                yield from commands(below, f"{path} {name}")


def help_of(path: str) -> str:
    """Return what a command prints with --help in a terminal of 80 columns."""
    context = click.Context(cli, info_name="coatrt", terminal_width=_WIDTH, **cli.context_settings)
    command: click.Command = cli
    for name in path.split()[1:]:
        assert isinstance(command, click.Group)
        below = command.get_command(context, name)
        assert below is not None
        command = below
        context = click.Context(command, parent=context, info_name=name)
    return command.get_help(context)


def page() -> str:
    """Return the page."""
    paths = [path for path, _ in commands()]
    links = [f"[{path}](#{path.replace(' ', '-')})" for path in paths]
    parts = [_HEAD, " ·\n".join(links) + "\n"]
    parts += [f"## {path}\n\n```text\n{help_of(path)}\n```\n" for path in paths]
    return "\n".join(parts)


def main() -> int:
    """Write the page, or compare it, and return the exit code."""
    if sys.argv[1:] == ["--check"]:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
            return 0
        print(f"{PAGE} is not what --help shows; run python docs/cli_reference.py", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
