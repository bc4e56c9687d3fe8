"""`coatrt train`."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from coatrt.cli.common import tell_of_gpu

__all__ = ["command"]


def _numbers(_: click.Context, __: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers; give them with commas, like 4,5,6") from None


def _ranks(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[tuple[str, int], ...] | None:
    if value is None:
        return None
    try:
        return tuple((kind, int(rank)) for kind, rank in (part.split("=") for part in value.split(",")))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of ranks; give them like down_proj=32,o_proj=32") from None


@click.command()
@click.argument("model")
@click.option(
    "--data",
    "data",
    multiple=True,
    required=True,
    metavar="PATH",
    help="Text file or directory of *.txt (chat, choice: JSONL file, *.jsonl); repeatable.",
)
@click.option(
    "--task",
    type=click.Choice(["text", "chat", "choice"]),
    default="text",
    show_default=True,
    help="What the data are: text, conversations, or questions with choices.",
)
@click.option(
    "--held-out", multiple=True, metavar="PATH", help="Data to measure on; default: every tenth document or line."
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the adapter.")
@click.option("--formats", metavar="F,F,…", help="Weight formats a configuration may use.")
@click.option("--rank", type=int, help="LoRA rank, a multiple of 16.")
@click.option("--alpha", type=float, help="LoRA scale numerator.")
@click.option("--ranks", callback=_ranks, metavar="KIND=R,…", help="Ranks of module kinds that differ: down_proj=32.")
@click.option("--preset", type=click.Choice(["coatrt", "paper", "none"]), help="Form of θ; none: compensation alone.")
@click.option("--compensation/--no-compensation", default=None, help="A term of B per format, in closed form; on.")
@click.option(
    "--start", type=click.Choice(["mixed", "residual", "random"]), help="Where A begins, beside compensation; mixed."
)
@click.option(
    "--quantizer",
    type=click.Choice(["absmax", "mse", "weighted", "gptq", "feedback"]),
    help="How weights are encoded.",
)
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--batch", type=int, help="Blocks (examples) per configuration and step.")
@click.option("--same-examples", is_flag=True, default=None, help="All configurations of a step see the same ones.")
@click.option("--accumulate", type=int, help="Parts a batch is cut into, to save memory and padding.")
@click.option("--length", type=int, help="Tokens per block, most tokens of an example.")
@click.option("--configs", type=int, help="Configurations per step.")
@click.option("--low-bits", type=float, help="Lowest budget trained for, bits per weight.")
@click.option("--high-bits", type=float, help="Highest budget trained for.")
@click.option("--planned", type=float, help="Share of planner-like configurations.")
@click.option("--learning-rate", type=float, help="Peak learning rate of A.")
@click.option("--rate-ratio", type=float, help="Peak learning rate of B over that of A.")
@click.option("--theta-rate", type=float, help="Peak learning rate of the hypernetwork.")
@click.option("--distill", type=float, help="Weight of a teacher's predictions beside the task's loss.")
@click.option(
    "--teacher",
    type=click.Choice(["base", "top"]),
    help="Who teaches: the full-precision model, or the configuration with the most bits of a step.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    help="Of the model's weights and products, not the LoRA's.",
)
@click.option("--evaluate-every", type=int, help="Steps between measurements of the hypervolume.")
@click.option("--patience", type=int, help="Measurements without a better one after which training stops.")
@click.option("--budgets", callback=_numbers, metavar="B,B,…", help="Average bits to measure at on held-out data.")
@click.option("--calibration", type=int, help="Blocks to calibrate on; by default as many as the model wants.")
@click.option("--evaluation", type=int, help="Held-out blocks (examples) to measure on; choice: 200 if not given.")
@click.option("--checkpoint-every", type=int, help="Steps between checkpoints.")
@click.option("--seed", type=int, help="Seed of start values, batches and configurations.")
@click.option("--compute", default="cpu", show_default=True, help="torch device that trains: cpu, cuda.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace a finished adapter, forget an unfinished one.")
def command(
    model: str,
    data: tuple[str, ...],
    task: str,
    held_out: tuple[str, ...],
    output: Path,
    compute: str,
    resume: bool,
    overwrite: bool,
    **given: Any,
) -> None:
    r"""Train a configuration-aware LoRA for MODEL (Hugging Face directory, hub name or GGUF file).

    \b
    --task text    UTF-8 text
    --task chat    a JSON object a line: {"messages": [{"role": …, "content": …}, …]}
                   or {"prompt": …, "completion": …}; the assistant's answers are learned
    --task choice  a JSON object a line: {"prompt": …, "choices": [" yes", " no"], "answer": 0}

    Options left out keep the defaults of coatrt.training.run.TrainOptions.
    """
    from coatrt.cli.progress import drawn
    from coatrt.data.registry import load_task
    from coatrt.models.checkpoint import Checkpoint, load_tokenizer
    from coatrt.models.spec import DecoderSpec
    from coatrt.system.resources import compute_device
    from coatrt.training.run import TrainOptions, train

    compute_device(compute)
    tell_of_gpu(compute)
    if given.get("formats"):
        given["formats"] = tuple(given["formats"].split(","))
    if task == "choice" and given.get("evaluation") is None:
        given["evaluation"] = 200  # an accuracy over the 16 blocks that do for a loss would say little
    known = {field.name for field in fields(TrainOptions)}
    options = TrainOptions(**{name: value for name, value in given.items() if name in known and value is not None})
    checkpoint = Checkpoint.open(model)
    DecoderSpec.from_checkpoint(checkpoint)  # a model that cannot be exported is refused now, not after training
    tokenizer = load_tokenizer(checkpoint.directory)
    loaded = load_task(task, data, tokenizer, options.length, held_out=held_out or None)
    _tell_of_few_tokens(options, checkpoint, loaded)
    with drawn("train") as progress:
        adapter = train(
            model, loaded, output, options, resume=resume, overwrite=overwrite, compute=compute, progress=progress
        )
    click.echo(_summary(adapter.metrics, output))


def _tell_of_few_tokens(options: Any, checkpoint: Any, data: Any) -> None:
    """Say on standard error that error feedback is calibrated on too little."""
    from coatrt.quantization.codec import FED_BACK
    from coatrt.quantization.input_moments import tokens_wanted

    given = options.calibration_blocks(checkpoint.matrices) * options.length
    tokens, wanted = min(int((data.train.last + 1).sum()), given), tokens_wanted(checkpoint.matrices)
    if options.quantizer in FED_BACK and tokens < wanted:
        click.echo(
            f"coatrt: calibrated on {tokens:,} tokens, and error feedback wants {wanted:,} for this model; give more "
            "--data or --calibration",
            err=True,
        )


def _summary(metrics: Any, output: Path) -> str:
    from math import exp

    found = metrics["held_out"]
    lines = [
        f"adapter        {output}",
        f"trained        {len(metrics['losses'])} steps in {metrics['seconds']:.0f} s",
    ]
    if metrics["dropped"]:
        lines.append(f"dropped        {metrics['dropped']} lines longer than {metrics['options']['length']} tokens")
    lines += [
        f"held-out perplexity over {metrics['held_out_tokens']} tokens",
        f"  full precision, no adapter {exp(found['full_precision']):8.2f}",
    ]
    lines += [
        f"  {row['bits']:5.2f} bits: without {exp(row['without']):10.2f}   with adapter {exp(row['adapted']):8.2f}"
        for row in found["budgets"]
    ]
    if "full_precision_accuracy" in found:
        lines += [
            f"held-out accuracy over {metrics['held_out_examples']} questions",
            f"  full precision, no adapter {found['full_precision_accuracy']:8.3f}",
        ]
        lines += [
            f"  {row['bits']:5.2f} bits: without {row['without_accuracy']:10.3f}   "
            f"with adapter {row['adapted_accuracy']:8.3f}"
            for row in found["budgets"]
        ]
    return "\n".join(lines)
