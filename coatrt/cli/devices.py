"""`coatrt devices`."""

from collections.abc import Iterable

import click

from coatrt.cli.common import echo_json
from coatrt.devices import DeviceProfile, devices

__all__ = ["command"]


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the source of every figure.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the device profiles; `devices probe` asks for the GPUs of this machine."""
    if ctx.invoked_subcommand is None:
        _show(devices(), as_json)


@command.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def probe(as_json: bool) -> None:
    """Show the GPUs of this machine."""
    from coatrt.probe import probe as ask

    found = ask()
    if not found and not as_json:
        click.echo("no NVIDIA GPU here: nvidia-smi is not installed; the device cpu runs everything")
        return
    _show(found, as_json)


def _show(profiles: Iterable[DeviceProfile], as_json: bool) -> None:
    if as_json:
        echo_json([profile.to_json() for profile in profiles])
        return
    lines = [("id", "name", "SM", "GiB", "GB/s", "TFLOPS", "builder", "formats")]
    for p in profiles:
        lines.append(
            (p.id, p.name, str(p.sm or "-"), f"{p.memory_bytes / 2**30:.0f}" if p.memory_bytes else "?",
             f"{p.bandwidth / 1e9:.0f}" if p.bandwidth else "?", f"{p.fp16_flops / 1e12:.1f}" if p.fp16_flops else "?",
             p.builder, " ".join(kind for kind in p.kinds if not kind.startswith("nf")) + " nf2-8")
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    right = {2, 3, 4, 5}
    for line in lines:
        cells = (
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        click.echo("  ".join(cells).rstrip())
