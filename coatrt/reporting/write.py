"""Adapters and bundles → one self-contained HTML page, and its figures."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from coatrt import __version__
from coatrt.bundle import SignaturePolicy
from coatrt.errors import ConfigError
from coatrt.evaluation.presentation import overhead_text, perplexity_text
from coatrt.planning.plan import PlanRequest
from coatrt.reporting.collect import Report, collect
from coatrt.reporting.figures import draw, figure_names
from coatrt.reporting.summary import base_row, describe, digits, label, listed, merged, model_name, rows, sentences
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
    title: str = "",
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
        title: what the page calls the model; by default the name of its directory, or its name on the hub.

    Raises:
        ConfigError: nothing to report is found, the paths belong to several models, a key is given and no bundle,
            `output` is a directory, or matplotlib is not installed.
        CheckpointError, BundleError: one is damaged, or not signed by the key.
    """
    require("coatrt report", "report")
    output = Path(output)
    if output.is_dir():
        raise ConfigError(f"{output} is a directory; give the name of the HTML file")
    found = collect(
        [Path(path) for path in paths], tuple(dict.fromkeys(devices)), request or PlanRequest(), key, policy, title
    )
    write_text(output, page(found, command))
    for name in figure_names(found) if png is not None else ():
        with atomic_file(Path(str(png)) / f"{name}.png") as temporary:
            temporary.write_bytes(draw(name, found, "png"))
    return found


_HEADS = ("Bits per weight", "Size", "Memory in use", "Speed")
_BACKENDS = {"ort": "ONNX Runtime, CPU", "cuda": "ONNX Runtime, CUDA", "trt": "TensorRT"}
_COLOURS = {"#1f2933": "var(--ink)", "#616e7c": "var(--faint)", "#e4e7eb": "var(--line)", "#ffffff": "var(--card)"}
"""Colours of a figure that follow the page, which may be dark."""


def page(report: Report, command: str) -> str:
    """Return the HTML of a report that the command line `command` asks for: one page that needs nothing else."""
    environment = Environment(
        loader=PackageLoader("coatrt.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    entries, qualities = report.entries, [entry.quality for entry in report.entries if entry.quality is not None]
    accuracy = bool(qualities) and all(quality.task == "choice" for quality in qualities)
    what = "Right answers" if accuracy else "Perplexity"
    return environment.get_template("page.html.jinja").render(
        report=report,
        name=model_name(report),
        sentences=sentences(report),
        heads=(*_HEADS, f"{what} without LoRA", f"{what} with its LoRA"),
        quality_head=what,
        rows=rows(report),
        base=base_row(report),
        accuracy=accuracy,
        measured_on=listed(map(describe, qualities)) if qualities else "",
        unmeasured=len(qualities) < len(entries),
        figures={name: _inline(name, report) for name in figure_names(report)},
        predicted_speed=any(entry.decode_tokens_per_second is None for entry in entries),
        benches=_benches(report),
        choices=_choices(report),
        sources=(
            ("versions", [f"{package} {version}" for package, version in report.versions.items()]),
            ("predicted speeds", sorted({entry.plan.get("latency_source", "") for entry in entries} - {""})),
            ("figures of devices", sorted({line for entry in entries for line in entry.device.get("sources", ())})),
        ),
        perplexity_text=perplexity_text,
        command=command,
        version=__version__,
    )


def _inline(name: str, report: Report) -> str:
    """Return a figure as SVG for the page: its colours follow the page, and its ids are no other figure's."""
    svg = draw(name, report, "svg").decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg)  # figure_1, axes_1, patch_2: nothing refers to them
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg ", f'<svg role="img" aria-label="figure: {name}" ', 1)


def _benches(report: Report) -> list[dict[str, Any]]:
    """Return a row for each bundle that was timed, wherever that was."""
    found = []
    for entry in report.entries:
        if entry.bench is None:
            continue
        backend, machine = entry.bench["backend"], entry.bench["environment"]
        speed = next((row["tokens_per_s"] for row in entry.bench["decode"] if row["lora"]), None)
        batch = f" in {backend['batch']} sequences" if backend["batch"] > 1 else ""
        found.append(
            {
                "name": label(entry),
                "machine": machine["cpu"] if backend["backend"] == "ort" else listed(machine["gpus"]),
                "backend": _BACKENDS[backend["backend"]],
                "speed": f"{digits(speed, 3)}{batch}" if speed is not None else "–",
                "overhead": overhead_text(
                    entry.bench["lora_overhead"], entry.bench["lora_overhead_interval"], entry.bench["repetitions"]
                ),
            }
        )
    return found


def _choices(report: Report) -> list[dict[str, Any]]:
    """Return what limited each choice; devices whose rows are equal share one."""

    def facts(entry: Any) -> tuple[Any, ...]:
        formats = ", ".join(f"{count} × {text}" for text, count in entry.config.counts.items())
        return formats, entry.plan.get("binds", "–"), tuple(entry.plan.get("next_steps", ())) or ("–",)

    groups = [(listed(map(label, group)), facts(group[0])) for group in merged(report.entries, facts)]
    return [dict(zip(("name", "formats", "binds", "steps"), (name, *row), strict=True)) for name, row in groups]
