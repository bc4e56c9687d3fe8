"""`coatrt export`."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from coatrt.cli.common import ACTIVATIONS, CPU_ACTIVATIONS, MODEL, PATH, SIGN
from coatrt.cli.help import documented
from coatrt.errors import ConfigError

__all__ = ["command"]

_OF_BUNDLES = ("activations", "cpu_activations", "context", "sign")


@documented(
    examples=(
        "coatrt export adapter --config plan.json -o exported",
        "coatrt export adapter --config plan.json -o exported-4k --context 4096",
        "coatrt export adapter --config plan.json --format compressed-tensors -o vllm",
        "coatrt export adapter --config plan.json --format gguf -o llama.cpp",
    ),
    first=("config_path", "output", "kind"),
)
@click.argument("adapter", type=PATH)
@click.option("--config", "config_path", required=True, type=PATH, help="Configuration, or plan of coatrt plan.")
@click.option("-o", "--output", required=True, type=PATH, help="Directory to write.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["bundle", "compressed-tensors", "gguf"]),
    default="bundle",
    help="A bundle; or the model and its LoRA for other runtimes: compressed-tensors and PEFT for vLLM and "
    "transformers, two GGUF files for llama.cpp.",
)
@MODEL
@ACTIVATIONS
@CPU_ACTIVATIONS
@click.option("--context", type=int, default=2048, help="Tokens that the KV cache of a sequence holds.")
@SIGN
@click.option("--overwrite", is_flag=True, help="Replace what an earlier export wrote.")
def command(
    adapter: Path, config_path: Path, output: Path, kind: str, model: str | None, overwrite: bool, **choices: Any
) -> None:
    """Export a configuration as a bundle without an engine, or for other runtimes.

    A bundle holds ONNX graphs, the hypernetwork and the LoRA, and runs with --backend ort and cuda. ADAPTER is a
    directory that coatrt train wrote.
    """
    if kind == "bundle":
        _bundle(adapter, config_path, output, model, overwrite, **choices)
        return
    source = click.get_current_context().get_parameter_source
    for name in _OF_BUNDLES:
        if source(name) is ParameterSource.COMMANDLINE:
            raise ConfigError(f"--{name.replace('_', '-')} is not for --format {kind}; leave it out")
    _checkpoint(adapter, config_path, output, kind, model, overwrite)


def _bundle(
    adapter: Path,
    config_path: Path,
    output: Path,
    model: str | None,
    overwrite: bool,
    *,
    activations: str,
    cpu_activations: str,
    context: int,
    sign: Path | None,
) -> None:
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


def _checkpoint(adapter: Path, config_path: Path, output: Path, kind: Any, model: str | None, overwrite: bool) -> None:
    from coatrt.system.extras import require

    require(f"coatrt export --format {kind}", "train", *(["gguf"] if kind == "gguf" else []))
    from coatrt.adapter.adapter import Adapter
    from coatrt.cli.progress import drawn_progress
    from coatrt.export.checkpoints.export import export_checkpoint
    from coatrt.planning.plan import read_choice

    loaded = Adapter.from_pretrained(adapter)
    config, _ = read_choice(config_path, loaded.description.model)
    with drawn_progress("export") as progress:
        made = export_checkpoint(loaded, config, output, kind, model=model, overwrite=overwrite, progress=progress)
    click.echo(f"model  {made.model}\nLoRA   {made.lora}")
    if made.line is not None:
        click.echo(made.line)
