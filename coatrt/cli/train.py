"""`coatrt train`."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

__all__ = ["command"]


def _numbers(_: click.Context, __: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers; give them with commas, like 4,5,6") from None


@click.command()
@click.argument("model")
@click.option(
    "--data", "data", multiple=True, required=True, metavar="PATH", help="Text file or directory of *.txt; repeatable."
)
@click.option("--held-out", multiple=True, metavar="PATH", help="Text to measure on; default: every tenth document.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the adapter.")
@click.option("--formats", metavar="F,F,…", help="Weight formats a configuration may use.")
@click.option("--rank", type=int, help="LoRA rank, a multiple of 16.")
@click.option("--alpha", type=float, help="LoRA scale numerator.")
@click.option("--preset", type=click.Choice(["coatrt", "paper"]), help="Form of the hypernetwork.")
@click.option(
    "--quantizer", type=click.Choice(["absmax", "mse", "weighted", "feedback"]), help="How weights are encoded."
)
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--batch", type=int, help="Blocks per configuration and step.")
@click.option("--length", type=int, help="Tokens per block.")
@click.option("--configs", type=int, help="Configurations per step.")
@click.option("--low-bits", type=float, help="Lowest budget trained for, bits per weight.")
@click.option("--high-bits", type=float, help="Highest budget trained for.")
@click.option("--planned", type=float, help="Share of planner-like configurations.")
@click.option("--learning-rate", type=float, help="Peak learning rate of A and B.")
@click.option("--theta-rate", type=float, help="Peak learning rate of the hypernetwork.")
@click.option("--budgets", callback=_numbers, metavar="B,B,…", help="Average bits at which held-out loss is measured.")
@click.option("--calibration", type=int, help="Blocks for sensitivities and second moments.")
@click.option("--evaluation", type=int, help="Held-out blocks to measure on.")
@click.option("--checkpoint-every", type=int, help="Steps between checkpoints.")
@click.option("--seed", type=int, help="Seed of start values, batches and configurations.")
@click.option("--compute", default="cpu", show_default=True, help="torch device that trains: cpu, cuda.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace a finished adapter, forget an unfinished one.")
def command(model: str, data: tuple[str, ...], held_out: tuple[str, ...], output: Path, compute: str, resume: bool,
            overwrite: bool, **given: Any) -> None:  # fmt: skip
    """Train a configuration-aware LoRA for MODEL (Hugging Face directory, hub name or GGUF file) on text.

    Options left out keep the defaults of coatrt.train.TrainOptions.
    """
    from coatrt.data import read_documents
    from coatrt.train import TrainOptions, train

    if given.get("formats"):
        given["formats"] = tuple(given["formats"].split(","))
    known = {field.name for field in fields(TrainOptions)}
    options = TrainOptions(**{name: value for name, value in given.items() if name in known and value is not None})
    documents = read_documents(data)
    measured = read_documents(held_out) if held_out else None
    adapter = train(
        model, documents, output, options, held_out=measured, resume=resume, overwrite=overwrite, compute=compute
    )
    click.echo(_summary(adapter.metrics, output))


def _summary(metrics: Any, output: Path) -> str:
    from math import exp

    found = metrics["held_out"]
    lines = [
        f"adapter        {output}",
        f"trained        {len(metrics['losses'])} steps in {metrics['seconds']:.0f} s",
        f"held-out perplexity over {metrics['held_out_tokens']} tokens",
        f"  full precision, no adapter {exp(found['full_precision']):8.2f}",
    ]
    lines += [
        f"  {row['bits']:5.2f} bits: without {exp(row['without']):10.2f}   with adapter {exp(row['adapted']):8.2f}"
        for row in found["budgets"]
    ]
    return "\n".join(lines)
