"""`coatrt verify`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from coatrt.cli.common import JSON, MODEL, PATH, check_writable, echo_json, trust_options
from coatrt.cli.help import documented

if TYPE_CHECKING:
    from coatrt.bundle import SignaturePolicy

__all__ = ["command"]


@documented(
    examples=(
        "coatrt verify bundles/l4",
        "coatrt verify bundles/l4 --no-torch",
        "coatrt verify bundles/l4 --data texts/",
        "coatrt verify bundles/l4 --key publisher.pem",
    ),
)
@click.argument("bundle", type=PATH)
@MODEL
@trust_options
@click.option("--no-torch", is_flag=True, help="Skip the comparison of logits with torch.")
@click.option(
    "--data",
    multiple=True,
    metavar="PATH",
    help="Measure quality on this held-out text (chat, choice: JSONL), without and with the LoRA; repeatable.",
)
@click.option("--task", type=click.Choice(["text", "chat", "choice"]), default="text", help="Kind of the data.")
@click.option(
    "--examples",
    type=click.IntRange(min=1),
    show_default="32 blocks of text; 256 conversations or questions",
    help="Maximum number of held-out examples.",
)
@click.option("--max-length", type=click.IntRange(min=2), default=256, help="Maximum tokens of an example.")
@JSON
def command(
    bundle: Path,
    model: str | None,
    key: Path | None,
    signature: "SignaturePolicy | None",
    no_torch: bool,
    data: tuple[str, ...],
    task: str,
    examples: int | None,
    max_length: int,
    as_json: bool,
) -> None:
    """Check a bundle: hashes, signature, versions, logits.

    The LoRA is compared with the one that the hypernetwork emits, the logits with those of the same weights in torch.
    BUNDLE is a directory that coatrt build or export wrote. With --data, quality on held-out data is measured too and
    saved as BUNDLE.quality.json, where coatrt report reads it.
    """
    from coatrt.bundle import Bundle
    from coatrt.cli.progress import drawn_progress
    from coatrt.engines.bundles.verify import verify
    from coatrt.reporting.measured import quality_path, save_quality
    from coatrt.system.json_data import to_data

    if data and no_torch:
        raise click.UsageError("--data measures with torch; leave out --no-torch")
    opened = Bundle.open(bundle, key=key, policy=signature)
    if data:
        check_writable(quality_path(bundle))
    with drawn_progress("verify") as progress:
        report = verify(opened, model=model, numbers=not no_torch, progress=progress)
    if not as_json:
        click.echo(report.text())
    if not data:
        if as_json:
            echo_json(report)
        return
    from coatrt.data.registry import load_task
    from coatrt.engines.bundles.quality import measure_quality, sampled
    from coatrt.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(opened.folder("tokenizer"))
    with drawn_progress("verify") as progress:
        loaded = load_task(task, data, tokenizer, max_length, held_out=data, progress=progress)
        most = examples or (32 if task == "text" else 256)
        quality = measure_quality(opened, sampled(loaded, most), model=model, progress=progress)
    path = save_quality(opened, quality)
    if as_json:
        echo_json({**to_data(report), "quality": quality})
    else:
        click.echo(f"{quality.text()}\nsaved          {path}")
