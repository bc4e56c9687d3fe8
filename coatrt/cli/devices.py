"""`coatrt devices`."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coatrt.cli.common import JSON, MODEL, PATH, check_writable, echo_json, runtime_options
from coatrt.devices.profiles import DeviceProfile, device_profiles
from coatrt.system.text_table import aligned

if TYPE_CHECKING:
    from coatrt.planning.measured_latency import MeasuredLatency

__all__ = ["command"]


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the source of every figure.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the device profiles; `probe` asks for this machine's GPUs, `calibrate` times its CPU."""
    if ctx.invoked_subcommand is None:
        _show(device_profiles(), as_json)


@command.command()
@JSON
def probe(as_json: bool) -> None:
    """Show the GPUs of this machine."""
    from coatrt.devices.probe import probe as ask

    found = ask()
    if not found and not as_json:
        click.echo("no NVIDIA GPU here: nvidia-smi is not installed; the device cpu runs everything")
        return
    _show(found, as_json)


@command.command()
@click.argument("adapter", type=PATH)
@MODEL
@runtime_options("threads", "accuracy_level")
@JSON
def calibrate(adapter: Path, model: str | None, as_json: bool, **runtime: Any) -> None:
    """Time every product of ADAPTER's model on this CPU; `plan --target cpu` predicts with it from then on."""
    from coatrt.adapter.adapter import Adapter
    from coatrt.cli.progress import drawn_progress
    from coatrt.engines.measure.cpu_timings import time_cpu
    from coatrt.engines.runtime.options import RuntimeOptions
    from coatrt.planning.measured_latency import timings_path
    from coatrt.system.json_data import write_json

    loaded, path = Adapter.from_pretrained(adapter), timings_path("cpu")
    check_writable(path)
    with drawn_progress("calibrate") as progress:
        made = time_cpu(loaded, loaded.checkpoint(model), RuntimeOptions(**runtime), progress=progress)
    try:
        write_json(path, made, sealed=True)
    finally:  # what was measured is shown, kept or not
        _show_timings(made, as_json)
    if not as_json:
        click.echo(f"{path}: {made.source}")


def _show_timings(made: "MeasuredLatency", as_json: bool) -> None:
    if as_json:
        echo_json(made)
        return
    rows = [("K", "N", "tokens", "µs", "format")]
    rows += [(str(p.K), str(p.N), str(p.tokens), f"{p.seconds * 1e6:.1f}", p.format) for p in made.products]
    click.echo(aligned(rows, ">>>><"))
    for rest in made.rests:
        click.echo(f"all else, {rest.tokens} tokens, {rest.context} slots: {rest.seconds * 1e3:.2f} ms")


def _show(profiles: Iterable[DeviceProfile], as_json: bool) -> None:
    if as_json:
        echo_json([profile.to_json() for profile in profiles])
        return
    rows = [("id", "name", "SM", "GiB", "GB/s", "TFLOPS", "builder", "formats")]
    for p in profiles:
        rows.append(
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
    click.echo(aligned(rows, "<<>>>><<"))
