"""The `coatrt` command: a lazy click group, so that --help imports nothing heavy."""

import importlib
import sys
from contextlib import suppress

import click

from coatrt import __version__
from coatrt.cli import streams
from coatrt.cli.signals import end_on_signals
from coatrt.errors import CoatError
from coatrt.system.extras import extra_of, needs

__all__ = ["cli", "main"]

_COMMANDS = {
    "devices": "List the device profiles, or probe the GPUs of this machine.",
    "train": "Train a configuration-aware LoRA for a model.",
    "search": "Measure configurations of an adapter for the planner.",
    "plan": "Choose a configuration for a device.",
    "export": "Write the ONNX graphs of a configuration.",
    "build": "Make a bundle per device: plan, graphs, LoRA, engine.",
    "adapt": "Emit the LoRA of a configuration from a bundle's hypernetwork.",
    "verify": "Check a bundle: hashes, versions, numbers.",
    "run": "Generate text from a bundle.",
    "bench": "Measure a bundle on this machine.",
    "report": "Write an HTML page about adapters and bundles.",
    "cmake-dir": "Print where the C++ library's CMake package is.",
}


class _LazyGroup(click.Group):
    """Imports the module of a command only when that command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"coatrt.cli.{name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="coatrt")
def cli() -> None:
    """One language model on many GPUs: a precision map per device and a LoRA fitted to it."""


def main() -> None:
    """Run the CLI; an error is one line on standard error.

    Exit codes: 0, 2 for what the user can change, 1 where nobody reads the output any more, 70 for what nobody foresaw
    (a report is written), 130 after Ctrl-C, 143 after SIGTERM.
    """
    streams.steady()
    end_on_signals()
    try:
        code = _run()
        lost = streams.flush()
        if lost is not None and code == 0:
            code = _ending(lost)
    except KeyboardInterrupt as error:
        code = _ending(error)
    streams.flush()
    sys.exit(code)


def _run() -> int:
    """Run the command and return its exit code, whatever happens."""
    try:
        code = cli.main(prog_name="coatrt", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Abort as error:  # click's word for Ctrl-C
        return _ending(error.__cause__ or error)
    except click.ClickException as error:
        with suppress(OSError):
            context = error.ctx if isinstance(error, click.UsageError) else None
            help = f"; {context.command_path} --help lists what is allowed" if context is not None else ""
            streams.say(f"{error.format_message().rstrip('.')}{help}")
        return error.exit_code
    except SystemExit:
        raise
    except BaseException as error:  # panics of libraries in Rust are no Exceptions
        return _ending(error)


def _ending(error: BaseException) -> int:
    """Say what happened in one line and return the exit code."""
    if isinstance(error, KeyboardInterrupt | click.exceptions.Abort):
        streams.say("interrupted")
        return 130
    if isinstance(error, BrokenPipeError):
        return 1
    said = _foreseen(error)
    if said is not None:
        streams.say(said)
        return 2
    from coatrt.cli.crash_report import write_report

    path = write_report(error, sys.argv[1:])
    kept = f"a report is in {path}" if path is not None else "no report could be written"
    streams.say(f"unexpected {type(error).__name__}: {str(error)[:300]}; {kept}; please send it to the authors")
    return 70


def _foreseen(error: BaseException) -> str | None:
    """Return what to say of an error that the user can do something about, else None."""
    if isinstance(error, CoatError):
        return str(error)
    extra = extra_of(error)
    if extra is not None:
        name = next((word for word in sys.argv[1:] if word in _COMMANDS), "")
        return needs(f"coatrt {name}".rstrip(), extra)
    if isinstance(error, OSError) and error.errno is not None:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return f"{what}; check the path, its permissions and the free disk space"
    if isinstance(error, MemoryError):
        return f"not enough memory ({error}); close other programs or use a smaller model"
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which is not imported for it
        hint = "try coatrt train --precision bfloat16, a higher --accumulate or a shorter --max-length"
        return f"not enough GPU memory: {hint}"
    if isinstance(error, RuntimeError) and "allocate memory" in str(error):  # torch's on the CPU
        return "not enough memory; close other programs, use a smaller model, or a lower --batch or --max-length"
    return None
