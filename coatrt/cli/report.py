"""`coatrt report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coatrt.cli.common import PATH, trust_options
from coatrt.cli.help import documented
from coatrt.cli.plan import plan_options, plan_request

if TYPE_CHECKING:
    from coatrt.bundle import SignaturePolicy

__all__ = ["command"]


@documented(
    examples=(
        "coatrt report adapter bundles -o report.html",
        "coatrt report adapter --target rtx-4060 --target l4 --bits 4.5 -o report.html",
        "coatrt report bundles/l4 -o report.html --png figures",
    ),
    first=(
        *("output", "devices", "bits", "memory", "objective", "max_loss", "min_tokens_per_second", "context"),
        "png",
    ),
)
@click.argument("paths", nargs=-1, required=True, type=PATH)
@click.option(
    "--target",
    "devices",
    multiple=True,
    metavar="DEVICE",
    help="Plan the adapters for this device (see coatrt devices); repeatable.",
)
@plan_options
@trust_options
@click.option("-o", "--output", required=True, type=PATH, help="HTML file to write.")
@click.option("--title", default="", help="Name of the model on the page.  [default: of its directory or on the hub]")
@click.option("--png", type=PATH, help="Write the figures as PNG files to this directory, too.")
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
    """Write an HTML report about adapters and bundles.

    PATHS are directories of adapters, of bundles, or that hold bundles. The report is one file that loads nothing else.
    Measurements of a bundle NAME are read beside it: NAME.quality.json, which coatrt verify NAME --data TEXT writes,
    and NAME.bench.json, from coatrt bench NAME -o NAME.bench.json.
    """
    import shlex
    import sys

    from coatrt.cli.progress import drawn_progress
    from coatrt.reporting.figures import figure_names
    from coatrt.reporting.write import report

    origin = shlex.join(["coatrt", *sys.argv[1:]])
    request = plan_request(choices)
    with drawn_progress("report"):
        written = report(
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
    for note in written.notes:
        click.echo(f"coatrt: {note}", err=True)
    measured = sum(entry.quality is not None for entry in written.entries)
    count = len(written.entries)
    click.echo(f"{output}: {count} configuration{'s' if count != 1 else ''}, {measured} with measured quality")
    if not measured:
        click.echo("coatrt: for measured quality run coatrt verify BUNDLE --data TEXT for each bundle", err=True)
    for name in figure_names(written) if png is not None else ():
        click.echo(f"{png}/{name}.png")
