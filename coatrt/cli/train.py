"""`coatrt train`."""

from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from math import inf
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import click

from coatrt.cli.common import DATA, DEVICE, PATH, warn_of_idle_gpu, with_options
from coatrt.cli.help import Option, documented
from coatrt.training.options import TrainOptions

if TYPE_CHECKING:
    from coatrt.adapter.adapter import Adapter
    from coatrt.system.progress import Progress

__all__ = ["command", "train_options"]


class _Commas(click.ParamType[tuple[Any, ...]]):
    """Values separated by commas.

    Args:
        name: shown in the help, such as B,B,….
        read: text → value; raises ValueError for a wrong one.
        example: shown in error messages.
    """

    def __init__(self, name: str, read: Callable[[str], Any], example: str) -> None:
        self.name, self._read, self._example = name, read, example

    def convert(
        self, value: str | tuple[Any, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._read(part) for part in value.split(",") if part)
        except ValueError:
            self.fail(f"not a list of values: {value!r}; separate them with commas, like {self._example}", param, ctx)


def _rank(text: str) -> tuple[str, int]:
    kind, rank = text.split("=")
    return kind, int(rank)


_LISTS = {
    "formats": _Commas("F,F,…", str, "nf3-g64,int8"),
    "ranks": _Commas("KIND=R,…", _rank, "down_proj=32,o_proj=32"),
    "budgets": _Commas("B,B,…", float, "4,5,6"),
}


def _option(field: "Field[Any]", kind: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    flag, help, default = "--" + field.name.replace("_", "-"), field.metadata["help"], field.default
    if kind is bool:
        flags = f"{flag}/--no-{field.name}" if default else flag
        return click.option(flags, cls=Option, is_flag=True, default=default, help=help)
    if isinstance(default, tuple):
        default = ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in default)
    shown = field.metadata["unset"] or default != ""
    short = ["--length"] if field.name == "max_length" else []
    return click.option(
        flag, *short, cls=Option, type=_type(field, kind), default=default, show_default=shown, help=help
    )


def _type(field: "Field[Any]", kind: Any) -> click.ParamType[Any]:
    """Return the type of an option, with the limits of its field."""
    least, above, most = (field.metadata[limit] for limit in ("least", "above", "most"))
    finite = None if most == inf else most
    if field.name in _LISTS:
        return _LISTS[field.name]
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if int in (kind, *get_args(kind)):
        return click.IntRange(min=least, max=finite)
    return click.FLOAT if above is None else click.FloatRange(min=above, min_open=True, max=finite)


_STAGES = {
    "quantizing": 1,
    "measuring gradients": 2,
    "measuring errors": 2,
    "measuring inputs": 2,
    "LoRA directions": 2,
    "learning scales": 2,
    "training": 3,
    "held-out loss": 4,
}
_KINDS = get_type_hints(TrainOptions)
train_options = with_options(*(_option(field, _KINDS[field.name]) for field in fields(TrainOptions)))
"""Adds an option for each field of `TrainOptions`, named as the field is."""


@documented(
    examples=(
        "coatrt train HuggingFaceTB/SmolLM2-135M --data texts/ -o adapter",
        "coatrt train model.gguf --data texts/ -o adapter --steps 1000 --device cuda",
        "coatrt train models/chat --data talks.jsonl --task chat -o adapter",
        "coatrt train HuggingFaceTB/SmolLM2-135M --data texts/ -o adapter --resume",
    ),
    first=(
        *("data", "output", "task", "held_out", "steps", "batch", "max_length", "formats", "rank", "precision"),
        *("device", "resume", "overwrite"),
    ),
    terms=(
        "Data of a task",
        (
            ("text", "UTF-8 text."),
            (
                "chat",
                'A JSON object per line: {"messages": [{"role": …, "content": …}, …]} or '
                '{"prompt": …, "completion": …}. The assistant\'s answers are learned.',
            ),
            ("choice", 'A JSON object per line: {"prompt": …, "choices": [" yes", " no"], "answer": 0}.'),
        ),
    ),
)
@click.argument("model")
@DATA
@click.option(
    "--task",
    type=click.Choice(["text", "chat", "choice"]),
    default="text",
    help="What the data are: text, conversations, or questions with choices.",
)
@click.option(
    "--held-out", multiple=True, metavar="PATH", help="Data to measure on.  [default: every tenth document or line]"
)
@click.option("-o", "--output", required=True, type=PATH, help="Directory of the adapter to write.")
@click.option("--resume", is_flag=True, help="Resume from the last checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace a finished adapter; discard an unfinished one.")
@DEVICE
@train_options
def command(
    model: str,
    data: tuple[str, ...],
    task: str,
    held_out: tuple[str, ...],
    output: Path,
    resume: bool,
    overwrite: bool,
    device: str,
    **choices: Any,
) -> None:
    """Train an adapter: a LoRA for every configuration of a model.

    MODEL is a Hugging Face directory, a name on the Hugging Face hub, or a GGUF file.
    """
    from coatrt.system.extras import require

    require("coatrt train", "train", "cpu")
    from coatrt.cli.progress import drawn_progress, write_line
    from coatrt.data.registry import load_task
    from coatrt.models.checkpoint import Checkpoint
    from coatrt.models.spec import DecoderSpec
    from coatrt.models.tokenizer import load_tokenizer
    from coatrt.system.resources import compute_device
    from coatrt.training.calibration import few_tokens_notice
    from coatrt.training.checkpoint_formats import checkpoint_notice
    from coatrt.training.output import check_output
    from coatrt.training.run import train

    started = monotonic()
    check_output(output, resume=resume, overwrite=overwrite)
    compute_device(device)
    warn_of_idle_gpu(device)
    options = TrainOptions(**choices)
    with drawn_progress("train") as progress:
        checkpoint = Checkpoint.open(model)
        DecoderSpec.from_config(checkpoint.config)  # an unknown family is named before its tokenizer fails
        tokenizer = load_tokenizer(checkpoint.directory)
        loaded = load_task(task, data, tokenizer, options.max_length, held_out=held_out or None, progress=progress)
        for notice in (
            checkpoint_notice(checkpoint, options),
            few_tokens_notice(options, checkpoint.matrices, loaded),
        ):
            if notice is not None:
                write_line(f"coatrt: {notice}")
        adapter = train(
            model,
            loaded,
            output,
            options,
            resume=resume,
            overwrite=overwrite,
            device=device,
            progress=_numbered(progress),
        )
    click.echo(_summary(adapter, output, monotonic() - started))


def _numbered(progress: "Progress") -> "Progress":
    """Return what draws progress with the number of the stage, of four, before its name."""

    def show(done: int, total: int, stage: str, note: str = "", /) -> None:
        number = _STAGES.get(stage)
        progress(done, total, f"{number}/4 {stage}" if number else stage, note)

    return show


def _summary(adapter: "Adapter", output: Path, seconds: float) -> str:
    """Return the steps, the time and the held-out numbers of a training as text."""
    from coatrt.evaluation.presentation import accuracy_text, perplexity_text

    metrics = adapter.description.metrics
    measured = metrics["held_out"]
    lines = [
        f"saved          {output}",
        f"trained        {len(metrics['losses'])} steps in {metrics['seconds']:.0f} s, {seconds:.0f} s in all",
    ]
    if metrics["dropped"]:
        lines.append(f"dropped        {metrics['dropped']} lines longer than {metrics['options']['max_length']} tokens")
    lines += _held_out(measured, f"perplexity over {metrics['held_out_tokens']} tokens", "", perplexity_text)
    if "full_precision_accuracy" in measured:
        count = metrics["held_out_examples"]
        title = f"accuracy over {count} questions, with its 95 % interval"
        lines += _held_out(measured, title, "_accuracy", lambda share: accuracy_text(share, count))
    return "\n".join(lines)


def _held_out(measured: Mapping[str, Any], title: str, suffix: str, text: Callable[[float], str]) -> list[str]:
    """Return lines of the held-out numbers whose keys end in `suffix`."""
    lines = [f"held-out {title}", f"  full precision, without LoRA {text(measured[f'full_precision{suffix}']):>8}"]
    for row in measured["budgets"]:
        without, adapted = text(row[f"without{suffix}"]), text(row[f"adapted{suffix}"])
        lines.append(f"  {row['bits']:5.2f} bits: without LoRA {without:>10}   with LoRA {adapted:>8}")
    return lines
