"""`coatrt build`."""

from pathlib import Path
from typing import Any

import click

from coatrt.cli.plan import plan_options

__all__ = ["command"]


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--device", "devices", multiple=True, required=True, help="Device id (coatrt devices); repeatable.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path),
              help="The bundle's directory; with several devices, the directory of their bundles.")  # fmt: skip
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="This configuration instead of a plan.")
@plan_options
@click.option("--model", help="The adapter's model, where it has moved.")
@click.option("--activations", type=click.Choice(["float16", "bfloat16"]), default="float16", show_default=True)
@click.option("--cpu-activations", type=click.Choice(["float32", "float16"]), default="float32", show_default=True)
@click.option("--no-engine", is_flag=True, help="Leave the engine out.")
@click.option("--dry-run", is_flag=True, help="Only show the plans.")
@click.option("--overwrite", is_flag=True, help="Replace bundles that are there.")
def command(adapter: Path, devices: tuple[str, ...], output: Path, config_path: Path | None, memory: int | None,
            bits: float | None, objective: Any, max_loss: float, context: int, batch: int, prefill: int,
            model: str | None, activations: str, cpu_activations: str, no_engine: bool, dry_run: bool,
            overwrite: bool) -> None:  # fmt: skip
    """Make a bundle of ADAPTER per device: plan, graphs, hypernetwork, LoRA, engine."""
    from coatrt.adapter import Adapter
    from coatrt.adapter_search import adapter_archive
    from coatrt.config import QuantConfig
    from coatrt.devices import device
    from coatrt.engines.assemble import BundleOptions, assemble, check_output
    from coatrt.engines.builder import EngineShapes
    from coatrt.plan import plan_for
    from coatrt.progress import stages

    profiles = [device(name) for name in dict.fromkeys(devices)]
    loaded = Adapter.load(adapter)
    archive = adapter_archive(adapter) if config_path is None else None
    targets = []
    for profile in profiles:
        if config_path is not None:
            plan, config = None, QuantConfig.load(config_path, loaded.model)
        else:
            plan = plan_for(loaded, profile, memory=memory, bits=bits, objective=objective, max_loss=max_loss,
                            context=context, batch=batch, prefill=prefill, archive=archive)  # fmt: skip
            config = plan.config
        targets.append((profile, plan, config, output if len(profiles) == 1 else output / profile.id))
    if not dry_run:
        for *_, place in targets:  # before the first build, not after it
            check_output(place, overwrite)
    for _, plan, _, _ in targets:
        if plan is not None:
            click.echo(plan.text() + "\n")
    if dry_run:
        return
    checkpoint = loaded.checkpoint(model)
    codes = loaded.codes(checkpoint)
    options = BundleOptions(
        activations, cpu_activations, context, EngineShapes(batch, min(prefill, context)), engine=not no_engine
    )
    for profile, plan, config, place in targets:
        with stages(profile.id) as progress:
            bundle = assemble(
                loaded, checkpoint, config, profile, place, options, plan=plan, codes=codes, overwrite=overwrite,
                progress=lambda done, total, _, progress=progress: progress(done, total, "matrices"),  # type: ignore[misc]
                tell=lambda line: click.echo(line, err=True),
            )  # fmt: skip
        engines = ", ".join(
            f"{engine['file']} {engine['bytes'] / 1e6:.1f} MB in {engine['seconds']:.1f} s"
            for engine in bundle.manifest["engines"]
        )
        click.echo(f"{place}: {engines or 'no engine'}; weights are {config.nbytes(loaded.model) / 1e6:.1f} MB ideally")
