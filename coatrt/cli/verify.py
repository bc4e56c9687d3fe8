"""`coatrt verify`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from coatrt.cli.common import JSON, MODEL, PATH, echo_json, trust_options

if TYPE_CHECKING:
    from coatrt.bundle import SignaturePolicy

__all__ = ["command"]


@click.command()
@click.argument("bundle", type=PATH)
@MODEL
@trust_options
@click.option("--no-torch", is_flag=True, help="Leave out the comparison with torch.")
@JSON
def command(
    bundle: Path,
    model: str | None,
    key: Path | None,
    signature: "SignaturePolicy | None",
    no_torch: bool,
    as_json: bool,
) -> None:
    """Check BUNDLE: signature, hashes, versions, its LoRA, and its logits against torch."""
    from coatrt.bundle import Bundle
    from coatrt.cli.progress import drawn_progress
    from coatrt.engines.bundles.verify import verify

    opened = Bundle.open(bundle, key=key, policy=signature)
    with drawn_progress("verify") as progress:
        report = verify(opened, model=model, numbers=not no_torch, progress=progress)
    if as_json:
        echo_json(report)
    else:
        click.echo(report.text())
