"""The `coatrt` command: a lazy click group, so that --help imports nothing heavy."""

import importlib
import sys

import click

from coatrt import __version__
from coatrt.cli.signals import end_on_signals
from coatrt.errors import CoatError

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
    """Run the CLI; a CoatError becomes one line on stderr and exit code 2."""
    end_on_signals()
    try:
        cli()
        return
    except CoatError as error:
        said = " ".join(str(error).split())
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
        said = f"{what}; check the path, its permissions and the free disk space"
    except MemoryError as error:
        said = f"not enough memory ({error}); close other programs or use a smaller model"
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # of torch, which is not imported for it
            raise
        hint = "try coatrt train --precision bfloat16, a higher --accumulate or a shorter --max-length"
        said = f"not enough GPU memory: {hint}"
    print(f"coatrt: {said}", file=sys.stderr)
    sys.exit(2)
