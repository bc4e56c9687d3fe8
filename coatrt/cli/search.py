"""`coatrt search`."""

from pathlib import Path

import click

from coatrt.cli.common import DATA, DEVICE, JSON, MODEL, PATH, echo_json, warn_of_idle_gpu

__all__ = ["command"]


@click.command()
@click.argument("adapter", type=PATH)
@DATA
@click.option("--evaluations", type=int, default=60, show_default=True, help="Configurations to measure in all.")
@click.option(
    "--blocks",
    type=click.IntRange(min=1),
    show_default="8; for chat and choice 64",
    help="Blocks of text (lines of chat or choice) for each loss.",
)
@click.option(
    "--max-length",
    "--length",
    type=click.IntRange(min=2),
    show_default="128; for chat and choice as in training",
    help="Tokens of a block of text; most tokens of a line of chat or choice.",
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
    """Measure configurations of ADAPTER on held-out text, and keep them where `coatrt plan` finds them.

    ADAPTER/archive.json is saved after every measurement; an interrupted search is resumed.
    """
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
    click.echo(
        f"{len(archive)} configurations measured, {len(front)} on the front, hypervolume {volume:.4f} "
        f"below ({reference[0]:.3f} bits, loss {reference[1]:.3f})"
    )
    for entry in front:
        click.echo(f"  {archive.bits(entry):6.3f} bits with the LoRA   loss {entry.loss:8.4f}   {entry.config.hash}")
