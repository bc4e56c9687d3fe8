"""`coatrt devices`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from coatrt.cli.common import echo_json
from coatrt.cli.runtime import runtime_options
from coatrt.devices.profiles import DeviceProfile, device_profiles

__all__ = ["command"]


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the source of every figure.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the device profiles; `probe` asks for this machine's GPUs, `calibrate` times its CPU."""
    if ctx.invoked_subcommand is None:
        _show(device_profiles(), as_json)


@command.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def probe(as_json: bool) -> None:
    """Show the GPUs of this machine."""
    from coatrt.devices.probe import probe as ask

    found = ask()
    if not found and not as_json:
        click.echo("no NVIDIA GPU here: nvidia-smi is not installed; the device cpu runs everything")
        return
    _show(found, as_json)


@command.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--model", help="The adapter's model, where it has moved.")
@runtime_options("threads", "accuracy_level")
@click.option("--json", "as_json", is_flag=True, help="Print the timings as JSON.")
def calibrate(adapter: Path, model: str | None, as_json: bool, **runtime: Any) -> None:
    """Time every product of ADAPTER's model on this CPU; `plan --target cpu` predicts with it from then on."""
    from coatrt.adapter.adapter import Adapter
    from coatrt.cli.progress import drawn_progress
    from coatrt.engines.measure.cpu_timings import time_cpu
    from coatrt.engines.runtime.options import RuntimeOptions
    from coatrt.planning.measured_latency import timings_path

    loaded = Adapter.from_pretrained(adapter)
    with drawn_progress("calibrate") as progress:
        made = time_cpu(loaded, loaded.checkpoint(model), RuntimeOptions(**runtime), progress=progress)
    path = timings_path("cpu")
    made.save(path)
    if as_json:
        echo_json(made.to_json())
        return
    click.echo(f"{'K':>6} {'N':>7} {'tokens':>6} {'µs':>10}  format")
    for row in made.products:
        click.echo(f"{row.K:>6} {row.N:>7} {row.tokens:>6} {row.seconds * 1e6:>10.1f}  {row.format}")
    for rest in made.rests:
        click.echo(f"all else, {rest.tokens} tokens, {rest.context} slots: {rest.seconds * 1e3:.2f} ms")
    click.echo(f"{path}: {made.source}")


def _show(profiles: Iterable[DeviceProfile], as_json: bool) -> None:
    if as_json:
        echo_json([profile.to_json() for profile in profiles])
        return
    lines = [("id", "name", "SM", "GiB", "GB/s", "TFLOPS", "builder", "formats")]
    for p in profiles:
        lines.append(
            (
                p.id,
                p.name,
                str(p.sm or "-"),
                f"{p.memory_bytes / 2**30:.0f}" if p.memory_bytes else "?",
                f"{p.bandwidth / 1e9:.0f}" if p.bandwidth else "?",
                f"{p.fp16_flops / 1e12:.1f}" if p.fp16_flops else "?",
                p.builder,
                " ".join(kind for kind in p.kinds if not kind.startswith("nf")) + " nf2-8",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    right = {2, 3, 4, 5}
    for line in lines:
        cells = (
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        click.echo("  ".join(cells).rstrip())
