"""`coatrt build`."""

from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from coatrt.cli.common import ACTIVATIONS, BYTES, CPU_ACTIVATIONS, MODEL, PATH, SIGN, TARGETS
from coatrt.cli.help import documented
from coatrt.cli.plan import plan_options, plan_request

if TYPE_CHECKING:
    from coatrt.bundle import Bundle
    from coatrt.engines.bundles.targets import BundleResult, Target
    from coatrt.planning.plan import Plan, PlanRequest

__all__ = ["command"]

_SIZES = ("context", "batch", "prefill")


@documented(
    examples=(
        "coatrt build adapter --target l4 --bits 4.5 -o bundles/l4",
        "coatrt build adapter --target rtx-4060 --target l4 --memory 6GiB -o bundles",
        "coatrt build adapter --target l4 --config plan.json -o bundles/l4",
        "coatrt build adapter --target cpu --bits 5 -o bundles/cpu --dry-run",
    ),
    first=(
        *("devices", "output", "bits", "memory", "objective", "config_path", "context", "batch"),
        *("no_engine", "genai", "jobs", "dry_run", "overwrite"),
    ),
)
@click.argument("adapter", type=PATH)
@TARGETS
@click.option(
    "-o",
    "--output",
    required=True,
    type=PATH,
    help="Directory of the bundle; with several targets, the directory of their bundles.",
)
@click.option(
    "--config", "config_path", type=PATH, help="Build this configuration, or plan of coatrt plan, instead of planning."
)
@plan_options
@MODEL
@ACTIVATIONS
@CPU_ACTIVATIONS
@click.option("--no-engine", is_flag=True, help="Build no TensorRT engine: the bundle runs in ONNX Runtime.")
@click.option(
    "--genai",
    type=PATH,
    help="Directory of what onnxruntime-genai loads, too: one model, or a package of several targets.",
)
@click.option("--jobs", type=int, help="Engines built in parallel.  [default: the usable cores]")
@click.option("--build-memory", type=BYTES, help="Memory for all builders.  [default: 70 % of the free memory]")
@click.option("--no-cache", is_flag=True, help="Build every engine, also those in the cache.")
@click.option("--dry-run", is_flag=True, help="Show the plans and what would be built; write nothing.")
@SIGN
@click.option("--overwrite", is_flag=True, help="Replace existing bundles that are not up to date.")
def command(
    adapter: Path,
    devices: tuple[str, ...],
    output: Path,
    config_path: Path | None,
    activations: str,
    cpu_activations: str,
    no_engine: bool,
    genai: Path | None,
    jobs: int | None,
    build_memory: int | None,
    sign: Path | None,
    dry_run: bool,
    **choices: Any,
) -> None:
    """Build a bundle for each device: graphs, LoRA, TensorRT engine.

    Each device gets the configuration of its plan (see coatrt plan). Bundles that are up to date are left as they are.
    ADAPTER is a directory that coatrt train wrote.
    """
    from coatrt.adapter.description import AdapterDescription
    from coatrt.devices.profiles import device_profile
    from coatrt.engines.builders.builder_slots import BuilderSlots
    from coatrt.engines.bundles.options import BundleOptions
    from coatrt.engines.bundles.prepare import prepare
    from coatrt.engines.bundles.targets import plan_targets
    from coatrt.planning.archive import adapter_archive
    from coatrt.planning.plan import read_choice
    from coatrt.planning.plans_text import fleet_table, plans_text
    from coatrt.system.extras import require

    source = click.get_current_context().get_parameter_source
    set_here = [name for name in choices if source(name) is ParameterSource.COMMANDLINE]
    request, slots = plan_request(choices), BuilderSlots(jobs, build_memory)
    profiles = [device_profile(name) for name in dict.fromkeys(devices)]
    description = AdapterDescription.load(adapter)
    choice = None if config_path is None else read_choice(config_path, description.model)
    if choice is not None:
        request = _request(request, set_here, str(config_path), choice[1])
    options = BundleOptions.of(request, activations=activations, cpu_activations=cpu_activations, engine=not no_engine)
    targets = plan_targets(description, profiles, output, request, choice=choice, archive=adapter_archive(adapter))
    if choice is None:
        plans = [target.plan for target in targets if target.plan is not None]
        click.echo((plans_text(plans) if dry_run else fleet_table(plans, sources=False)) + "\n")
    preparation = prepare(description, targets, options, overwrite=choices["overwrite"] or dry_run, sign=sign)
    if genai is not None:
        _check_genai(genai, targets, choices["overwrite"] or dry_run)
    if dry_run or not preparation.jobs:  # neither torch nor the model is needed to say so
        for target in targets:
            click.echo(f"{target.output}: {'up to date' if target.output in preparation.current else 'to build'}")
        if genai is not None and not dry_run:
            _export(genai, [preparation.current[target.output].bundle for target in targets], choices["overwrite"])
        return
    require("coatrt build", "train", "cpu")
    from coatrt.adapter.adapter import Adapter
    from coatrt.cli.progress import drawn_progress, write_line
    from coatrt.engines.builders.engine_cache import EngineCache
    from coatrt.engines.bundles.execute import execute

    with drawn_progress("build") as progress:
        loaded = Adapter.from_pretrained(adapter)
        results = execute(
            preparation,
            loaded,
            loaded.checkpoint(choices["model"]),
            cache=None if choices["no_cache"] else EngineCache.default(),
            slots=slots,
            progress=progress,
            tell=write_line,
        )
    for result in results:
        click.echo(f"{result.target.output}: {_outcome(result)}")
    if genai is not None:
        _export(genai, [result.bundle for result in results], choices["overwrite"])


def _check_genai(output: Path, targets: "Sequence[Target]", overwrite: bool) -> None:
    """Refuse, before the build, a directory that the export cannot be written to."""
    from coatrt.engines.genai.destination import check_destination
    from coatrt.errors import ConfigError

    for target in targets:
        if output.resolve().is_relative_to(target.output.resolve()):
            raise ConfigError(f"--genai {output} lies inside the bundle {target.output}; give a path outside")
    check_destination(output, overwrite=overwrite)


def _export(output: Path, bundles: "Sequence[Bundle]", overwrite: bool) -> None:
    """Write bundles for onnxruntime-genai and say so."""
    from coatrt.engines.genai.export import export_genai
    from coatrt.engines.genai.package import package_genai

    if len(bundles) == 1:
        export_genai(bundles[0], output, overwrite=overwrite)
    else:
        package_genai(bundles, output, overwrite=overwrite)
    click.echo(f"{output}: for onnxruntime-genai")


def _request(request: "PlanRequest", set_here: Collection[str], path: str, plan: "Plan | None") -> "PlanRequest":
    """Return the request to build a file's configuration with: that of its plan, else the sizes of the options.

    Raises:
        ConfigError: an option differs from the plan, or would choose the configuration that the file already holds.
    """
    from coatrt.errors import ConfigError

    for name in (field.name for field in fields(request) if field.name in set_here):
        option = f"--{name.replace('_', '-')}"
        if plan is None and name not in _SIZES:
            raise ConfigError(f"{path} already holds the configuration; leave out {option}, or --config")
        if plan is not None and getattr(request, name) != getattr(plan.request, name):
            was = getattr(plan.request, name)
            planned = f"without {option}" if was in (None, ()) else f"with {option} {was}"
            raise ConfigError(f"{path} was planned {planned}; leave out {option}, or plan again")
    return request if plan is None else plan.request


def _outcome(result: "BundleResult") -> str:
    """Return the outcome for a bundle: its engines, and the size of its files."""
    if result.state == "current":
        return "up to date"
    engines = ", ".join(
        f"{engine['file']} {engine['bytes'] / 1e6:.1f} MB "
        + ("from the cache" if result.state == "cached" else f"in {engine['seconds']:.1f} s")
        for engine in result.bundle.manifest["engines"]
    )
    size = sum(entry["bytes"] for entry in result.bundle.manifest["files"].values())
    return f"bundle of {size / 1e6:.1f} MB, {engines or 'no engine'}"
