"""`coatrt adapt`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from coatrt.cli.common import PATH, trust_options
from coatrt.cli.help import documented

if TYPE_CHECKING:
    from coatrt.bundle import SignaturePolicy
    from coatrt.engines.bundles.adapt import LoraFormat

__all__ = ["command"]


@documented(
    examples=(
        "coatrt adapt bundles/l4 -o lora.safetensors",
        "coatrt adapt bundles/l4 --config plan.json -o lora.safetensors",
        "coatrt adapt bundles/l4 --format peft -o lora",
    ),
    first=("output", "config_path", "kind"),
)
@click.argument("bundle", type=PATH)
@click.option("--config", "config_path", type=PATH, help="Configuration or plan.  [default: the bundle's own]")
@trust_options
@click.option("-o", "--output", required=True, type=PATH, help="File to write; for peft a directory.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["safetensors", "peft", "onnx-adapter"]),
    default="safetensors",
    help="coatrt's own file, a PEFT adapter, or ONNX Runtime's adapter file.",
)
def command(
    bundle: Path,
    config_path: Path | None,
    key: Path | None,
    signature: "SignaturePolicy | None",
    output: Path,
    kind: "LoraFormat",
) -> None:
    """Emit the LoRA of a configuration with a bundle's hypernetwork.

    It takes milliseconds, and needs neither torch nor the model. BUNDLE is a directory that coatrt build or export
    wrote.
    """
    from coatrt.bundle import Bundle
    from coatrt.engines.bundles.adapt import adapt
    from coatrt.planning.plan import read_choice

    opened = Bundle.open(bundle, key=key, policy=signature)
    config = read_choice(config_path, opened.model_matrices)[0] if config_path is not None else None
    lora = adapt(opened, output, config, format=kind)
    click.echo(f"{output}: LoRA of {lora.config.hash}, {lora.tensors} tensors, emitted in {lora.seconds * 1e3:.1f} ms")
