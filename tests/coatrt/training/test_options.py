"""The options of a training: what is refused, what comes back from JSON, and that the command line shows them all."""

from dataclasses import fields
from typing import Any

import click
import pytest
from click.testing import CliRunner

from coatrt.cli.main import cli
from coatrt.cli.train import train_options
from coatrt.errors import ConfigError, FormatError
from coatrt.system.json_data import convert, to_data
from coatrt.training.options import TrainOptions

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"calibration": 0}, "calibration must be at least 1, got 0"),
        ({"accumulate": 5}, "accumulate must be at most batch, 4, got 5"),
        ({"precision": "int8"}, "unknown precision 'int8'; allowed: float32, bfloat16"),
        ({"quantizer": "best"}, "unknown quantizer 'best'; allowed: absmax, mse, weighted, gptq, feedback, refined"),
        ({"rate_ratio": 0.0}, "rate_ratio must be above 0 and finite, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0 and finite, got nan"),
    ],
)
def test_options_refuse_what_is_not_allowed(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainOptions(**wrong)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(FormatError, match="int5"):
        TrainOptions(formats=("int5",))


def test_options_come_back_from_json() -> None:
    options = TrainOptions(formats=("int8", "nf3-g64"), ranks=(("down_proj", 32),), budgets=(4.5,), low_bits=3.5)
    assert convert(to_data(options), TrainOptions, "options", "", exact=True) == options
    with pytest.raises(ConfigError, match="options has the unknown key 'length'; did you mean 'max_length'\\?"):
        convert({"length": 32}, TrainOptions, "options", "train again", exact=True)
    with pytest.raises(ConfigError, match=r"garbled \(Expected `int`, got `str` - at `\$\.steps`\); train again"):
        convert({"steps": "many"}, TrainOptions, "options", "train again")


def test_an_accuracy_is_measured_on_more_examples_than_a_loss() -> None:
    assert [TrainOptions().held_out_limit(task) for task in ("text", "chat", "choice")] == [16, 16, 200]
    assert TrainOptions(evaluation=3).held_out_limit("choice") == 3


def test_help_shows_every_option_with_its_default() -> None:
    shown = " ".join(CliRunner().invoke(cli, ["train", "--help"], terminal_width=400).output.split())
    for field in fields(TrainOptions):
        flag, help, unset = "--" + field.name.replace("_", "-"), field.metadata["help"], field.metadata["unset"]
        assert f" {flag} " in shown.replace(",", " ")
        assert f"        {field.name}: {help}" in str(TrainOptions.__doc__)
        default = f"({unset})" if unset else field.default
        assert f"{help} [default: {default}" in shown or isinstance(default, (tuple, bool))
    assert "[default: nf3-g64,nf4-g64,int4-g64,nvfp4,fp8,int8,fp16]" in shown
    assert "[default: (those of 4, 5 and 6 that the formats allow, else the middle of their range)]" in shown
    assert "one per format. [default: compensation]" in shown


def test_options_of_the_command_line_are_those_of_the_class() -> None:
    taken: list[TrainOptions] = []

    @click.command()
    @train_options
    def command(**choices: Any) -> None:
        taken.append(TrainOptions(**choices))

    lists = "--ranks down_proj=32,o_proj=48 --budgets 4,5.5 --formats int8"
    for line in ("", f"{lists} --no-compensation --low-bits 4 --evaluation 7"):
        assert CliRunner().invoke(command, line.split()).exit_code == 0
    defaults, changed = taken
    assert defaults == TrainOptions()
    assert changed == TrainOptions(
        formats=("int8",),
        ranks=(("down_proj", 32), ("o_proj", 48)),
        budgets=(4.0, 5.5),
        compensation=False,
        low_bits=4.0,
        evaluation=7,
    )
