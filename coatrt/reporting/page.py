"""The page: one HTML file that needs nothing else."""

import math

from jinja2 import Environment, PackageLoader, StrictUndefined

from coatrt import __version__
from coatrt.reporting.collect import Report
from coatrt.reporting.figures import FIGURES, colour, draw

__all__ = ["page"]


def page(report: Report, command: str) -> str:
    """Return the HTML of a report.

    Args:
        report: what to show.
        command: how it was made.
    """
    timed = any(entry.plan.get("decode_seconds") for entry in report.entries)
    svgs = {name: draw(name, report, "svg").decode() for name in FIGURES if name != "latency" or timed}
    environment = Environment(
        loader=PackageLoader("coatrt.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.jinja").render(
        report=report,
        figures={name: svg[svg.index("<svg") :] for name, svg in svgs.items()},
        configurations=len({entry.config.hash for entry in report.entries}),
        latency_sources=sorted({entry.plan.get("latency_source", "") for entry in report.entries} - {""}),
        device_sources=sorted({source for entry in report.entries for source in entry.device.get("sources", ())}),
        command=command,
        version=__version__,
        colour=colour,
        exp=math.exp,
    )
