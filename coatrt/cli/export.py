"""`coatrt export`."""

from pathlib import Path

import click

from coatrt.cli.common import ACTIVATIONS, CPU_ACTIVATIONS, MODEL, PATH, SIGN
from coatrt.cli.help import documented

__all__ = ["command"]


@documented(
    examples=(
        "coatrt export adapter --config plan.json -o exported",
        "coatrt export adapter --config plan.json -o exported-4k --context 4096",
    ),
)
@click.argument("adapter", type=PATH)
@click.option("--config", "config_path", required=True, type=PATH, help="Configuration, or plan of coatrt plan.")
@click.option("-o", "--output", required=True, type=PATH, help="Directory of the bundle.")
@MODEL
@ACTIVATIONS
@CPU_ACTIVATIONS
@click.option("--context", type=int, default=2048, help="Tokens that the KV cache of a sequence holds.")
@SIGN
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
def command(
    adapter: Path,
    config_path: Path,
    output: Path,
    model: str | None,
    activations: str,
    cpu_activations: str,
    context: int,
    sign: Path | None,
    overwrite: bool,
) -> None:
    """Export a configuration as a bundle of ONNX graphs, without an engine.

    The bundle holds the hypernetwork and the LoRA, too, and runs with --backend ort and cuda. ADAPTER is a directory
    that coatrt train wrote.
    """
    from coatrt.system.extras import require

    require("coatrt export", "train", "cpu")
    from coatrt.adapter.adapter import Adapter
    from coatrt.adapter.description import AdapterDescription
    from coatrt.cli.progress import drawn_progress
    from coatrt.devices.profiles import device_profile
    from coatrt.engines.bundles.execute import execute
    from coatrt.engines.bundles.options import BundleOptions
    from coatrt.engines.bundles.prepare import prepare
    from coatrt.engines.bundles.targets import Target
    from coatrt.planning.plan import read_choice

    description = AdapterDescription.load(adapter)
    config, _ = read_choice(config_path, description.model)
    options = BundleOptions(activations, cpu_activations, context, engine=False)
    target = Target(device_profile("cpu"), config, output)
    preparation = prepare(description, [target], options, overwrite=overwrite, sign=sign)
    loaded = Adapter.from_pretrained(adapter)
    with drawn_progress("export") as progress:
        (result,) = execute(preparation, loaded, loaded.checkpoint(model), progress=progress)
    size = sum(facts["bytes"] for facts in result.bundle.manifest["files"].values())
    click.echo(f"{output}: {config.average_bits(description.model):.3f} bits per weight, {size / 1e6:.1f} MB in all")
