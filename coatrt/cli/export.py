"""`coatrt export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from coatrt.cli.common import ACTIVATIONS, CPU_ACTIVATIONS, MODEL, PATH, SIGN, trust_options
from coatrt.cli.help import documented
from coatrt.errors import ConfigError

if TYPE_CHECKING:
    from coatrt.bundle import SignaturePolicy

__all__ = ["command"]

_ONLY_FOR = {
    "model": ("bundle", "compressed-tensors", "gguf"),
    **dict.fromkeys(("activations", "cpu_activations", "context", "sign"), ("bundle",)),
    **dict.fromkeys(
        ("provider", "lora", "all_logits", "accuracy_level", "max_length", "key", "signature"), ("genai", "ortpackage")
    ),
}


@documented(
    examples=(
        "coatrt export adapter --config plan.json -o exported",
        "coatrt export adapter --config plan.json --format compressed-tensors -o vllm",
        "coatrt export bundles/l4 --format genai -o l4-genai",
        "coatrt export bundles/l4 bundles/rtx-4060 --format ortpackage -o fleet",
    ),
    first=("output", "kind", "config_paths", "provider", "lora", "all_logits", "context", "overwrite"),
)
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="Directory to write.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["bundle", "compressed-tensors", "gguf", "genai", "ortpackage"]),
    default="bundle",
    help="A bundle; the model and its LoRA for vLLM (compressed-tensors and PEFT) or llama.cpp (two GGUF files); or, "
    "from bundles, what onnxruntime-genai loads: one model, or a package with a variant for each.",
)
@click.option(
    "--config",
    "config_paths",
    multiple=True,
    type=PATH,
    help="Configuration, or plan of coatrt plan. genai: its LoRA is written too, named like the file; repeatable.",
)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    help="Where onnxruntime-genai computes.  [default: the bundle's device]",
)
@click.option(
    "--lora",
    type=click.Choice(["on", "off"]),
    default="on",
    help="Whether the LoRA applies without an active adapter (genai, ortpackage).",
)
@click.option("--all-logits", is_flag=True, help="Logits of every token, for evaluation and n-gram speculation.")
@click.option(
    "--accuracy-level",
    type=click.Choice(["0", "1", "4"]),
    default="4",
    help="int4 and int8 products on the CPU, as in coatrt run (genai, ortpackage).",
)
@click.option("--max-length", type=int, help="Default limit on a sequence in tokens.  [default: the bundle's context]")
@MODEL
@ACTIVATIONS
@CPU_ACTIVATIONS
@click.option("--context", type=int, default=2048, help="Tokens that the KV cache of a sequence holds (bundle).")
@SIGN
@trust_options
@click.option("--overwrite", is_flag=True, help="Replace an existing export.")
def command(sources: tuple[Path, ...], output: Path, kind: str, overwrite: bool, **choices: Any) -> None:
    """Export a bundle without an engine, or for another runtime.

    SOURCE is a directory that coatrt train wrote; with --config it becomes a bundle, which runs with --backend ort and
    cuda, or the model for vLLM or llama.cpp. For onnxruntime-genai, SOURCE is a bundle: neither torch nor the base
    model is needed.
    """
    source = click.get_current_context().get_parameter_source
    for name, kinds in _ONLY_FOR.items():
        if kind not in kinds and source(name) is ParameterSource.COMMANDLINE:
            raise ConfigError(f"--{name.replace('_', '-')} is not for --format {kind}; leave it out")
    if len(sources) > 1 and kind != "ortpackage":
        raise ConfigError(f"--format {kind} takes one SOURCE, got {len(sources)}; give one, or --format ortpackage")
    if kind in ("genai", "ortpackage"):
        _genai(sources, output, kind == "ortpackage", overwrite, **choices)
        return
    if len(paths := choices.pop("config_paths")) != 1:
        raise ConfigError(f"--format {kind} needs one configuration, got {len(paths)}; give --config once")
    if kind == "bundle":
        _bundle(sources[0], paths[0], output, overwrite, **choices)
    else:
        _checkpoint(sources[0], paths[0], output, kind, choices["model"], overwrite)


def _bundle(
    adapter: Path,
    config_path: Path,
    output: Path,
    overwrite: bool,
    *,
    model: str | None,
    activations: str,
    cpu_activations: str,
    context: int,
    sign: Path | None,
    **_: Any,
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
    config = read_choice(config_path, description.model)[0]
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


def _genai(
    sources: tuple[Path, ...],
    output: Path,
    package: bool,
    overwrite: bool,
    *,
    config_paths: tuple[Path, ...],
    provider: Any,
    lora: Any,
    all_logits: bool,
    accuracy_level: str,
    max_length: int | None,
    key: Path | None,
    signature: "SignaturePolicy | None",
    **_: Any,
) -> None:
    from coatrt.bundle import Bundle
    from coatrt.engines.genai.export import export_genai
    from coatrt.engines.genai.options import GenaiOptions
    from coatrt.engines.genai.package import package_genai
    from coatrt.planning.plan import read_choice

    options = GenaiOptions(provider, lora, all_logits, int(accuracy_level), max_length)  # type: ignore[arg-type]
    bundles = [Bundle.open(source, key=key, policy=signature) for source in sources]
    if package:
        if config_paths:
            raise ConfigError("--config is not for --format ortpackage: each variant has the LoRA of its bundle")
        packed = package_genai(bundles, output, options, overwrite=overwrite)
        click.echo(f"{output}: {', '.join(packed.variants)}, {packed.nbytes / 1e6:.1f} MB in all")
        return
    configs = {path.stem: read_choice(path, bundles[0].model_matrices)[0] for path in config_paths}
    if len(configs) < len(config_paths):
        raise ConfigError("two files of --config have the same name, which names the adapter; rename one")
    made = export_genai(bundles[0], output, options, adapters=configs, overwrite=overwrite)
    named = ", ".join(made.adapters)
    click.echo(f"{output}: for the {made.provider} provider, adapters {named}, {made.nbytes / 1e6:.1f} MB in all")
