"""The `coatrt` command: a lazy click group, so that --help imports nothing heavy."""

import importlib
import sys
from contextlib import suppress

import click

from coatrt import __version__
from coatrt.cli import streams
from coatrt.cli.help import Group
from coatrt.cli.signals import end_on_signals
from coatrt.errors import CoatError
from coatrt.system.extras import extra_of, needs

__all__ = ["cli", "main"]

_SECTIONS = {
    "From a model to a running bundle, in the order of use": {
        "train": "Train an adapter: a LoRA for every configuration of a model.",
        "plan": "Choose a configuration for each device.",
        "build": "Build a bundle for each device: graphs, LoRA, TensorRT engine.",
        "verify": "Check a bundle: hashes, signature, versions, logits.",
        "run": "Generate text with a bundle.",
        "bench": "Measure a bundle on this machine: prefill, decode, LoRA switch.",
        "report": "Write an HTML report about adapters and bundles.",
    },
    "More commands": {
        "devices": "List the known devices; probe or time those of this machine.",
        "adapt": "Emit the LoRA of a configuration with a bundle's hypernetwork.",
        "export": "Export a configuration as a bundle without an engine, or for other runtimes.",
        "search": "Measure configurations on held-out data, to improve later plans.",
        "cmake-dir": "Print the directory of the C++ library's CMake package.",
    },
}
_COMMANDS = {name: line for section in _SECTIONS.values() for name, line in section.items()}
"""Command → the first sentence of its help: listing the commands imports none of them."""

_EXAMPLES = (
    "coatrt train HuggingFaceTB/SmolLM2-135M --data texts/ -o adapter",
    "coatrt build adapter --target rtx-4060 --target l4 --bits 4.5 -o bundles",
    'coatrt run bundles/l4 -p "Once upon a time"',
)


class _LazyGroup(Group):
    """Imports the module of a command only when that command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"coatrt.cli.{name.replace('-', '_')}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:  # click looks for near names in `commands`, empty here
            raise click.exceptions.NoSuchCommand(error.command_name, possibilities=_COMMANDS, ctx=ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, section in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(list(section.items()))


@click.group(
    cls=_LazyGroup,
    examples=_EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True},
)
@click.version_option(__version__, prog_name="coatrt")
def cli() -> None:
    """Run one language model on many unlike GPUs, each with its own precision per layer and a LoRA fitted to it."""


def main() -> None:
    """Run the CLI; an error is one line on standard error.

    Exit codes: 0 for success, 2 for an error that the user can correct, 1 if the reader of the output is gone, 70 for
    an unexpected error (a report is written), 130 after Ctrl-C, 143 after SIGTERM.
    """
    streams.steady()
    end_on_signals()
    try:
        code = _run()
        failure = streams.flush()
        if failure is not None and code == 0:
            code = _ending(failure)
    except KeyboardInterrupt as error:
        code = _ending(error)
    streams.flush()
    sys.exit(code)


def _run() -> int:
    """Run the command and return its exit code, also after an error."""
    try:
        code = cli.main(prog_name="coatrt", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Abort as error:  # click's word for Ctrl-C
        return _ending(error.__cause__ or error)
    except click.ClickException as error:
        with suppress(OSError):
            context = error.ctx if isinstance(error, click.UsageError) else None
            message = error.format_message().rstrip(".")
            if context is not None:
                message += f"{' See' if message.endswith('?') else '; see'} {context.command_path} --help"
            streams.say(message)
        return error.exit_code
    except SystemExit:
        raise
    except BaseException as error:  # panics of libraries in Rust are no Exceptions
        return _ending(error)


def _ending(error: BaseException) -> int:
    """Print what happened in one line and return the exit code."""
    if isinstance(error, KeyboardInterrupt | click.exceptions.Abort):
        streams.say("interrupted")
        return 130
    if isinstance(error, BrokenPipeError):
        return 1
    message = _expected(error)
    if message is not None:
        streams.say(message)
        return 2
    from coatrt.cli.crash_report import write_report

    path = write_report(error, sys.argv[1:])
    report = f"a report is in {path}; please send it to the authors" if path else "no report could be written"
    streams.say(f"unexpected {type(error).__name__}: {str(error)[:300]}; {report}")
    return 70


def _expected(error: BaseException) -> str | None:
    """Return the message of an error that the user can correct, else None."""
    if isinstance(error, CoatError):
        return str(error)
    extra = extra_of(error)
    if extra is not None:
        name = next((word for word in sys.argv[1:] if word in _COMMANDS), "")
        return needs(f"coatrt {name}".rstrip(), extra)
    if isinstance(error, OSError) and error.errno is not None:
        problem = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return f"{problem}; check the path, its permissions and the free disk space"
    if isinstance(error, MemoryError):
        return f"not enough memory ({error}); close other programs or use a smaller model"
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which is not imported for it
        hint = "try coatrt train --precision bfloat16, a higher --accumulate or a shorter --max-length"
        return f"not enough GPU memory: {hint}"
    if isinstance(error, RuntimeError) and "allocate memory" in str(error):  # torch's on the CPU
        return "not enough memory; close other programs, use a smaller model, or a lower --batch or --max-length"
    return None
