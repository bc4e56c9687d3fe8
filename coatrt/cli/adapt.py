"""`coatrt adapt`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from coatrt.cli.common import PATH, trust_options

if TYPE_CHECKING:
    from coatrt.bundle import SignaturePolicy
    from coatrt.engines.bundles.adapt import LoraFormat

__all__ = ["command"]


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--config", "config_path", type=PATH, help="Configuration or plan; default: the bundle's own.")
@trust_options
@click.option("-o", "--output", required=True, type=PATH, help="File (peft: directory) to write.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["safetensors", "peft", "onnx-adapter"]),
    default="safetensors",
    show_default=True,
)
def command(
    bundle: Path,
    config_path: Path | None,
    key: Path | None,
    signature: "SignaturePolicy | None",
    output: Path,
    kind: "LoraFormat",
) -> None:
    """Emit the LoRA of a configuration with BUNDLE's hypernetwork: no torch, no base model."""
    from coatrt.bundle import Bundle
    from coatrt.engines.bundles.adapt import adapt
    from coatrt.planning.plan import read_choice

    opened = Bundle.open(bundle, key=key, policy=signature)
    config = read_choice(config_path, opened.model_matrices)[0] if config_path is not None else None
    made = adapt(opened, output, config, format=kind)
    click.echo(f"{output}: LoRA of {made.config.hash}, {made.tensors} tensors, emitted in {made.seconds * 1e3:.1f} ms")
