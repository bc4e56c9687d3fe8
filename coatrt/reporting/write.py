"""Adapters and bundles → one self-contained HTML page, and its figures."""

from collections.abc import Sequence
from pathlib import Path

from coatrt.errors import ConfigError
from coatrt.planning.plan import PlanRequest
from coatrt.reporting.collect import Report, collect
from coatrt.reporting.figures import FIGURES, draw
from coatrt.reporting.page import page
from coatrt.system.files import atomic_file, write_text

__all__ = ["report"]


def report(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    devices: Sequence[str] = (),
    request: PlanRequest | None = None,
    png: str | Path | None = None,
    command: str = "",
) -> Report:
    """Write a page about adapters and bundles, and return what it shows.

    Args:
        paths: adapters, bundles and directories of bundles.
        output: the HTML file.
        devices: ids of devices to plan the adapters for.
        request: what is asked of these plans.
        png: directory to write the figures into too.
        command: the command line that the page names as its origin.

    Raises:
        ConfigError: nothing to report is found, or `output` is a directory.
    """
    output = Path(output)
    if output.is_dir():
        raise ConfigError(f"{output} is a directory; give the name of the HTML file")
    found = collect([Path(path) for path in paths], tuple(dict.fromkeys(devices)), request or PlanRequest())
    write_text(output, page(found, command))
    for name in FIGURES if png is not None else ():
        with atomic_file(Path(str(png)) / f"{name}.png") as temporary:
            temporary.write_bytes(draw(name, found, "png"))
    return found
