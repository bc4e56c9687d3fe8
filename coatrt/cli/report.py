"""`coatrt report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coatrt.cli.common import PATH, trust_options
from coatrt.cli.plan import plan_options, plan_request

if TYPE_CHECKING:
    from coatrt.bundle import SignaturePolicy

__all__ = ["command"]


@click.command()
@click.argument("paths", nargs=-1, required=True, type=PATH)
@click.option(
    "--target", "--device", "devices", multiple=True, help="Plan adapters for this device (coatrt devices); repeatable."
)
@plan_options
@trust_options
@click.option("-o", "--output", required=True, type=PATH, help="The HTML file.")
@click.option("--png", type=PATH, help="Write the figures into this directory too.")
def command(
    paths: tuple[Path, ...],
    devices: tuple[str, ...],
    key: Path | None,
    signature: "SignaturePolicy | None",
    output: Path,
    png: Path | None,
    **choices: Any,
) -> None:
    """Write one self-contained HTML page about adapters, bundles and directories of bundles in PATHS."""
    import shlex
    import sys

    from coatrt.cli.progress import drawn_progress
    from coatrt.reporting.figures import FIGURES
    from coatrt.reporting.write import report

    origin = shlex.join(["coatrt", *sys.argv[1:]])
    request = plan_request(choices)
    with drawn_progress("report"):
        found = report(
            paths, output, devices=devices, request=request, png=png, command=origin, key=key, policy=signature
        )
    click.echo(f"{output}: {len(found.entries)} configurations")
    for name in FIGURES if png is not None else ():
        click.echo(f"{png}/{name}.png")
