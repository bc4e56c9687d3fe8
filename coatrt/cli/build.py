"""`coatrt build`."""

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from coatrt.cli.common import BYTES, MODEL, PATH, SIGN, TARGETS
from coatrt.cli.plan import plan_options, plan_request, plans_text

if TYPE_CHECKING:
    from coatrt.engines.bundles.targets import BundleResult
    from coatrt.planning.plan import Plan, PlanRequest

__all__ = ["command"]

_SIZES = ("context", "batch", "prefill")


@click.command()
@click.argument("adapter", type=PATH)
@TARGETS
@click.option(
    "-o",
    "--output",
    required=True,
    type=PATH,
    help="The bundle's directory; with several devices, the directory of their bundles.",
)
@click.option(
    "--config", "config_path", type=PATH, help="This configuration, or plan of one device, instead of planning."
)
@plan_options
@MODEL
@click.option("--activations", type=click.Choice(["float16", "bfloat16"]), default="float16", show_default=True)
@click.option("--cpu-activations", type=click.Choice(["float32", "float16"]), default="float32", show_default=True)
@click.option("--no-engine", is_flag=True, help="Leave the engine out.")
@click.option("--jobs", type=int, help="Most builders at once; default: the usable cores.")
@click.option("--build-memory", type=BYTES, help="Memory for all builders; default: 70 % of what is free.")
@click.option("--no-cache", is_flag=True, help="Build engines that an earlier build has left in the cache, too.")
@click.option("--dry-run", is_flag=True, help="Only show the plans, and what would be built.")
@SIGN
@click.option("--overwrite", is_flag=True, help="Replace bundles that are there and not up to date.")
def command(
    adapter: Path,
    devices: tuple[str, ...],
    output: Path,
    config_path: Path | None,
    activations: str,
    cpu_activations: str,
    no_engine: bool,
    jobs: int | None,
    build_memory: int | None,
    sign: Path | None,
    dry_run: bool,
    **choices: Any,
) -> None:
    """Make a bundle of ADAPTER for each device: plan, graphs, hypernetwork, LoRA, engine."""
    from coatrt.adapter.description import AdapterDescription
    from coatrt.devices.profiles import device_profile
    from coatrt.engines.builders.builder_slots import BuilderSlots
    from coatrt.engines.bundles.options import BundleOptions
    from coatrt.engines.bundles.prepare import prepare
    from coatrt.engines.bundles.targets import plan_targets
    from coatrt.planning.archive import adapter_archive
    from coatrt.planning.plan import read_choice

    source = click.get_current_context().get_parameter_source
    given = [name for name in choices if source(name) is ParameterSource.COMMANDLINE]
    request, slots = plan_request(choices), BuilderSlots(jobs, build_memory)
    profiles = [device_profile(name) for name in dict.fromkeys(devices)]
    description = AdapterDescription.load(adapter)
    choice = None if config_path is None else read_choice(config_path, description.model)
    if choice is not None:
        request = _request(request, given, str(config_path), choice[1])
    options = BundleOptions.of(request, activations=activations, cpu_activations=cpu_activations, engine=not no_engine)
    targets = plan_targets(description, profiles, output, request, choice=choice, archive=adapter_archive(adapter))
    if choice is None:
        click.echo(plans_text([target.plan for target in targets if target.plan is not None]) + "\n")
    preparation = prepare(description, targets, options, overwrite=choices["overwrite"] or dry_run, sign=sign)
    if dry_run or not preparation.jobs:  # neither torch nor the model is needed to say so
        for target in targets:
            click.echo(f"{target.output}: {'up to date' if target.output in preparation.current else 'to build'}")
        return
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
        click.echo(f"{result.target.output}: {_outcome(result, result.target.config.nbytes(description.model))}")


def _request(asked: "PlanRequest", given: Collection[str], path: str, plan: "Plan | None") -> "PlanRequest":
    """Return what to build a file's configuration with: the request of its plan, else the sizes that are asked for.

    Raises:
        ConfigError: an option says otherwise than the plan, or would decide a configuration that is given.
    """
    from coatrt.errors import ConfigError

    for name in (field.name for field in fields(asked) if field.name in given):
        option = f"--{name.replace('_', '-')}"
        if plan is None and name not in _SIZES:
            raise ConfigError(f"{option} is given and {path} is a configuration already; leave one of the two out")
        if plan is not None and getattr(asked, name) != getattr(plan.request, name):
            was = getattr(plan.request, name)
            planned = "without" if was in (None, ()) else f"with {was}"
            raise ConfigError(f"{option} is given and {path} was planned {planned}; leave it out, or plan again")
    return asked if plan is None else plan.request


def _outcome(result: "BundleResult", weights: int) -> str:
    """Return what came of a bundle: its engines, and the bytes that its weights take at least."""
    if result.state == "current":
        return "up to date"
    engines = ", ".join(
        f"{engine['file']} {engine['bytes'] / 1e6:.1f} MB "
        + ("from the cache" if result.state == "cached" else f"in {engine['seconds']:.1f} s")
        for engine in result.bundle.manifest["engines"]
    )
    return f"{engines or 'no engine'}; weights are {weights / 1e6:.1f} MB ideally"
