"""`coatrt lm-eval`."""

import click

from coatrt.cli.help import Command

__all__ = ["command"]


@click.command(
    cls=Command,
    examples=(
        "coatrt lm-eval --model coatrt --model_args bundle=bundles/l4 --tasks piqa",
        "coatrt lm-eval -M coatrt -a bundle=bundles/l4,lora=none -t piqa -b 8",
        "coatrt lm-eval ls tasks",
    ),
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Score a bundle on the tasks of lm-eval.

    ARGUMENTS are those of lm_eval, whose model coatrt is a bundle. lm_eval run --help lists them;
    docs/guides/evaluate.md lists those of the model.
    """
    from coatrt.engines.measure.lm_eval_command import run_lm_eval

    run_lm_eval(arguments)
