"""`coatrt devices`."""

from collections.abc import Iterable

import click

from coatrt.cli.calibrate import calibrate
from coatrt.cli.common import JSON, echo_json
from coatrt.cli.help import Group, documented
from coatrt.devices.profiles import DeviceProfile, device_profiles
from coatrt.system.text_table import aligned

__all__ = ["command"]


@click.group(
    cls=Group,
    invoke_without_command=True,
    examples=(
        "coatrt devices",
        "coatrt devices probe",
        "coatrt devices calibrate adapter --backend cuda",
    ),
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the source of every figure.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the known devices; probe or time those of this machine."""
    if ctx.invoked_subcommand is None:
        _show(device_profiles(), as_json)


@documented(examples=("coatrt devices probe", "coatrt devices probe --json"))
@JSON
def probe(as_json: bool) -> None:
    """Show the GPUs of this machine."""
    from coatrt.devices.probe import probe

    profiles = probe()
    if not profiles and not as_json:
        click.echo("no NVIDIA GPU here: nvidia-smi is not installed; the device cpu runs everything")
        return
    _show(profiles, as_json)


command.add_command(probe)
command.add_command(calibrate)


def _show(profiles: Iterable[DeviceProfile], as_json: bool) -> None:
    if as_json:
        echo_json([profile.to_json() for profile in profiles])
        return
    rows = [("id", "name", "SM", "GiB", "GB/s", "TFLOPS", "builder")]
    with_formats: dict[str, list[str]] = {}
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
            )
        )
        formats = " ".join(kind for kind in p.kinds if not kind.startswith("nf")) + " nf2-8"
        place = f"SM{p.sm}" if p.sm else p.id
        if place not in with_formats.setdefault(formats, []):
            with_formats[formats].append(place)
    click.echo(aligned(rows, "<<>>>><"))
    click.echo("\nweight formats")
    click.echo(aligned([(", ".join(places), formats) for formats, places in with_formats.items()], "<<"))
