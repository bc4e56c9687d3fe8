"""`coatrt report`."""

from pathlib import Path
from typing import Any

import click

from coatrt.cli.plan import plan_options, plan_request

__all__ = ["command"]


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--device", "devices", multiple=True, help="Plan adapters for this device; repeatable.")
@plan_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The HTML file.")
@click.option("--png", type=click.Path(path_type=Path), help="Write the figures into this directory too.")
def command(paths: tuple[Path, ...], devices: tuple[str, ...], output: Path, png: Path | None, **choices: Any) -> None:
    """Write one self-contained HTML page about adapters, bundles and directories of bundles in PATHS."""
    import shlex
    import sys

    from coatrt.errors import ConfigError
    from coatrt.report.collect import collect
    from coatrt.report.figures import FIGURES, draw
    from coatrt.report.page import page
    from coatrt.system.files import atomic_file, write_text

    if output.is_dir():
        raise ConfigError(f"{output} is a directory; give the name of the HTML file")
    report = collect(paths, tuple(dict.fromkeys(devices)), plan_request(choices))
    write_text(output, page(report, shlex.join(["coatrt", *sys.argv[1:]])))
    click.echo(f"{output}: {len(report.entries)} configurations")
    for name in FIGURES if png is not None else ():
        assert png is not None
        with atomic_file(png / f"{name}.png") as temporary:
            temporary.write_bytes(draw(name, report, "png"))
        click.echo(f"{png / name}.png")
