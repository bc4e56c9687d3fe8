"""Adapters and bundles → one self-contained HTML page, and its figures."""

import math
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from coatrt import __version__
from coatrt.bundle import SignaturePolicy
from coatrt.errors import ConfigError
from coatrt.planning.plan import PlanRequest
from coatrt.reporting.collect import Report, collect
from coatrt.reporting.figures import FIGURES, colour, draw
from coatrt.system.extras import require
from coatrt.system.files import atomic_file, write_text

__all__ = ["page", "report"]


def report(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    devices: Sequence[str] = (),
    request: PlanRequest | None = None,
    png: str | Path | None = None,
    command: str = "",
    key: str | Path | bytes | None = None,
    policy: SignaturePolicy | None = None,
) -> Report:
    """Write a page about adapters and bundles, and return what it shows.

    Args:
        paths: adapters, bundles and directories of bundles.
        output: the HTML file.
        devices: ids of devices to plan the adapters for.
        request: what is asked of these plans.
        png: directory to write the figures into too.
        command: the command line that the page names as its origin.
        key: public key that must have signed the bundles, see `Bundle.open`.
        policy: what becomes of one that it has not signed.

    Raises:
        ConfigError: nothing to report is found, a key is given and no bundle, or `output` is a directory.
        CheckpointError, BundleError: one is damaged, or not signed by the key.
    """
    require("coatrt report", "report")
    output = Path(output)
    if output.is_dir():
        raise ConfigError(f"{output} is a directory; give the name of the HTML file")
    found = collect(
        [Path(path) for path in paths], tuple(dict.fromkeys(devices)), request or PlanRequest(), key, policy
    )
    write_text(output, page(found, command))
    for name in FIGURES if png is not None else ():
        with atomic_file(Path(str(png)) / f"{name}.png") as temporary:
            temporary.write_bytes(draw(name, found, "png"))
    return found


def page(report: Report, command: str) -> str:
    """Return the HTML of a report that the command line `command` asks for: one page that needs nothing else."""
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
