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
@click.option("--title", default="", help="Name of the model on the page.  [default: of its directory or on the hub]")
@click.option("--png", type=PATH, help="Write the figures into this directory too.")
def command(
    paths: tuple[Path, ...],
    devices: tuple[str, ...],
    key: Path | None,
    signature: "SignaturePolicy | None",
    output: Path,
    title: str,
    png: Path | None,
    **choices: Any,
) -> None:
    """Write one self-contained HTML page about adapters, bundles and directories of bundles in PATHS.

    What was measured of a bundle NAME is read beside it: NAME.quality.json, which `coatrt verify NAME --data TEXT`
    writes, and NAME.bench.json, from `coatrt bench NAME -o NAME.bench.json`.
    """
    import shlex
    import sys

    from coatrt.reporting.figures import figure_names
    from coatrt.reporting.write import report

    origin = shlex.join(["coatrt", *sys.argv[1:]])
    request = plan_request(choices)
    found = report(
        paths,
        output,
        devices=devices,
        request=request,
        png=png,
        command=origin,
        key=key,
        policy=signature,
        title=title,
    )
    for note in found.notes:
        click.echo(f"coatrt: {note}", err=True)
    measured = sum(entry.quality is not None for entry in found.entries)
    click.echo(f"{output}: {len(found.entries)} bundles and plans, quality measured of {measured}")
    for name in figure_names(found) if png is not None else ():
        click.echo(f"{png}/{name}.png")
