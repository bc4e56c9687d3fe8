"""`coatrt verify`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from coatrt.cli.common import JSON, MODEL, PATH, echo_json, trust_options
from coatrt.cli.help import documented

if TYPE_CHECKING:
    from coatrt.bundle import SignaturePolicy

__all__ = ["command"]


@documented(
    examples=(
        "coatrt verify bundles/l4",
        "coatrt verify bundles/l4 --no-torch",
        "coatrt verify bundles/l4 --key publisher.pem",
    ),
)
@click.argument("bundle", type=PATH)
@MODEL
@trust_options
@click.option("--no-torch", is_flag=True, help="Skip the comparison of logits with torch.")
@JSON
def command(
    bundle: Path,
    model: str | None,
    key: Path | None,
    signature: "SignaturePolicy | None",
    no_torch: bool,
    as_json: bool,
) -> None:
    """Check a bundle: hashes, signature, versions, logits.

    The LoRA is compared with the one that the hypernetwork emits, the logits with those of the same weights in torch.
    BUNDLE is a directory that coatrt build or export wrote.
    """
    from coatrt.bundle import Bundle
    from coatrt.engines.bundles.verify import verify

    report = verify(Bundle.open(bundle, key=key, policy=signature), model=model, numbers=not no_torch)
    if as_json:
        echo_json(report)
    else:
        click.echo(report.text())
