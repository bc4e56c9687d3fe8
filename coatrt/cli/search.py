"""`coatrt search`."""

from pathlib import Path

import click

from coatrt.cli.common import DATA, DEVICE, JSON, MODEL, PATH, echo_json, warn_of_idle_gpu
from coatrt.cli.help import Option, documented

__all__ = ["command"]


@documented(
    examples=(
        "coatrt search adapter --data texts/",
        "coatrt search adapter --data texts/ --evaluations 200 --device cuda",
    )
)
@click.argument("adapter", type=PATH)
@DATA
@click.option("--evaluations", type=int, default=60, help="Configurations to measure in all.")
@click.option(
    "--blocks",
    type=click.IntRange(min=1),
    cls=Option,
    show_default="8; for chat and choice 64",
    help="Blocks of text (chat, choice: examples) that each loss is measured on.",
)
@click.option(
    "--max-length",
    "--length",
    type=click.IntRange(min=2),
    cls=Option,
    show_default="128; for chat and choice as in training",
    help="Tokens of a block of text; most tokens of an example of chat or choice.",
)
@MODEL
@DEVICE
@JSON
def command(
    adapter: Path,
    data: tuple[str, ...],
    evaluations: int,
    blocks: int | None,
    max_length: int | None,
    model: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure configurations on held-out data, to improve later plans.

    coatrt plan takes a measured configuration where it lost less than the predicted best. The file archive.json in
    ADAPTER is saved after every measurement; an existing archive is resumed. ADAPTER is a directory that coatrt train
    wrote.
    """
    from coatrt.system.extras import require

    require("coatrt search", "train", "cpu")
    from coatrt.adapter.adapter import Adapter
    from coatrt.cli.progress import drawn_progress
    from coatrt.data.registry import load_task
    from coatrt.models.tokenizer import load_tokenizer
    from coatrt.searching.run import search
    from coatrt.system.json_data import convert
    from coatrt.training.options import TrainOptions

    warn_of_idle_gpu(device)
    loaded = Adapter.from_pretrained(adapter)
    task = loaded.description.metrics["task"]
    if max_length is None:
        options = loaded.description.metrics["options"]
        trained = convert(options, TrainOptions, f"options in {adapter / 'metrics.json'}", "train again", exact=True)
        max_length = 128 if task == "text" else trained.max_length
    with drawn_progress("search") as progress:
        tokenizer = load_tokenizer(loaded.checkpoint(model).directory)
        archive, reference = search(
            adapter,
            load_task(task, data, tokenizer, max_length, held_out=data, progress=progress),
            evaluations=evaluations,
            blocks=blocks or (8 if task == "text" else 64),
            model=model,
            device=device,
            progress=progress,
        )
    front, volume = archive.front(), archive.hypervolume(reference)
    if as_json:
        echo_json(
            {
                "evaluations": len(archive),
                "reference": reference,
                "hypervolume": volume,
                "front": [
                    {"bits": archive.bits(e), "nbytes": e.nbytes, "loss": e.loss, "configuration_hash": e.config.hash}
                    for e in front
                ],
            }
        )
        return
    from coatrt.system.text_table import aligned

    click.echo(
        f"{len(archive)} configurations measured, all on the same held-out data; of these {len(front)} on the front, "
        "which no other beats in both bits and loss:"
    )
    rows = [(f"{archive.bits(entry):.2f}", f"{entry.loss:.3f}", entry.config.hash) for entry in front]
    click.echo(aligned([("bits with LoRA", "loss", "configuration"), *rows], ">><"))
