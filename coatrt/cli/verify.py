"""`coatrt verify`."""

from pathlib import Path

import click

from coatrt.cli.common import JSON, KEY, MODEL, PATH, echo_json

__all__ = ["command"]


@click.command()
@click.argument("bundle", type=PATH)
@MODEL
@KEY
@click.option("--no-torch", is_flag=True, help="Leave out the comparison with torch.")
@JSON
def command(bundle: Path, model: str | None, key: Path | None, no_torch: bool, as_json: bool) -> None:
    """Check BUNDLE: signature, hashes, versions, its LoRA, and its logits against torch."""
    from coatrt.bundle import Bundle
    from coatrt.engines.bundles.verify import verify

    report = verify(Bundle.open(bundle, key=key), model=model, numbers=not no_torch)
    if as_json:
        echo_json(report)
    else:
        click.echo(report.text())
