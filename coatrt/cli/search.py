"""`coatrt search`."""

from collections.abc import Sequence
from pathlib import Path

import click

from coatrt.cli.common import echo_json, tell_of_gpu

__all__ = ["command"]


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "data",
    multiple=True,
    required=True,
    metavar="PATH",
    help="Held-out text file or directory of *.txt (adapters of chat, choice: JSONL file, *.jsonl); repeatable.",
)
@click.option("--evaluations", type=int, default=60, show_default=True, help="Configurations to measure in all.")
@click.option("--blocks", type=int, help="Blocks of text for each loss, 8; of chat and choice 64 lines.")
@click.option("--length", type=int, help="Tokens per block, 128; of chat and choice the adapter's, and most of a line.")
@click.option("--model", help="The adapter's model, where it has moved.")
@click.option("--compute", default="cpu", show_default=True, help="torch device: cpu, cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print the front as JSON.")
def command(
    adapter: Path,
    data: tuple[str, ...],
    evaluations: int,
    blocks: int | None,
    length: int | None,
    model: str | None,
    compute: str,
    as_json: bool,
) -> None:
    """Measure configurations of ADAPTER on held-out text, and keep them where `coatrt plan` finds them.

    ADAPTER/archive.json is saved after every measurement; an interrupted search is resumed.
    """
    from coatrt.adapter.adapter import Adapter
    from coatrt.cli.progress import drawn
    from coatrt.data.documents import read_documents
    from coatrt.data.registry import load_task
    from coatrt.data.task_data import TaskData
    from coatrt.models.checkpoint import load_tokenizer
    from coatrt.search.run import search_adapter

    tell_of_gpu(compute)
    loaded = Adapter.load(adapter)
    task = loaded.metrics.get("task", "text")
    documents: Sequence[str] | TaskData
    if task == "text":
        documents, usual = read_documents(data), (8, 128)
    else:
        usual = (64, int(loaded.metrics["options"]["length"]))
        documents = load_task(
            task, data, load_tokenizer(loaded.checkpoint(model).directory), length or usual[1], held_out=data
        )
    blocks, length = usual[0] if blocks is None else blocks, usual[1] if length is None else length
    with drawn("search") as progress:
        archive, reference = search_adapter(
            adapter,
            documents,
            evaluations=evaluations,
            blocks=blocks,
            length=length,
            model=model,
            compute=compute,
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
