"""Numbers that nobody means: every numeric option of every command refuses them in one line, or takes them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from coatrt.cli.main import cli
from coatrt.engines.runtime.sampling import Sampling, next_token, probabilities
from coatrt.errors import CoatError, ConfigError
from support.tiny import TEXTS

NUMBERS = ("9" * 400, "-" + "9" * 400, "9" * 5000, "-1", "0", "nan", "-inf", "inf", "1e-320", "1e308", "1e999",
           "2147483648", "18446744073709551616", "100000", "0x10", "", "١٢", "1GiB", "9" * 30 + "GiB",
           "1,nan", "4,inf", "down_proj=" + "9" * 400, "down_proj=nan", "=", "\x00", "1\n2")  # fmt: skip

HEAVY = (
    "coatrt.training.run.train",
    "coatrt.searching.run.search",
    "coatrt.engines.bundles.execute.execute",
    "coatrt.engines.measure.bench.bench",
    "coatrt.engines.measure.cpu_timings.time_cpu",
    "coatrt.engines.runtime.load.load_decoder",
    "coatrt.engines.serving.server.Service",
    "coatrt.reporting.write.report",
)


def commands() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    with click.Context(cli) as context:
        for name in cli.list_commands(context):
            command = cli.get_command(context, name)
            assert command is not None
            if isinstance(command, click.Group):
                yield from ((((name, sub)), inner) for sub, inner in command.commands.items())
            else:
                yield (name,), command


def numeric() -> list[tuple[tuple[str, ...], str]]:
    """Return every option of every command that takes numbers."""
    found = []
    for path, command in commands():
        for parameter in command.params:
            kind = parameter.type
            plain = isinstance(kind, click.types.IntParamType | click.types.FloatParamType)
            if isinstance(parameter, click.Option) and (plain or kind.name in ("size", "B,B,…", "KIND=R,…")):
                found.append((path, max(parameter.opts, key=len)))
    return found


@pytest.fixture(scope="module")
def arguments(tiny_llama: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    here = tmp_path_factory.mktemp("options")
    (here / "text.txt").write_text("\n".join(TEXTS))
    bundle, data, out = here / "bundle", here / "text.txt", here / "out"
    build = [
        "build",
        tiny_adapter,
        "--target",
        "rtx-4090",
        "--bits",
        "5",
        "-o",
        bundle,
        "--no-engine",
        "--context",
        "64",
    ]
    assert CliRunner().invoke(cli, [str(part) for part in build]).exit_code == 0
    (here / "c.json").write_text('{"default": "int8"}')
    lists: dict[str, list[Any]] = {
        "train": [tiny_llama, "--data", data, "-o", out],
        "search": [tiny_adapter, "--data", data],
        "plan": [tiny_adapter, "--target", "t4"],
        "build": [tiny_adapter, "--target", "t4", "-o", out],
        "export": [tiny_adapter, "--config", here / "c.json", "-o", out],
        "run": [bundle, "-p", "x"],
        "chat": [bundle],
        "serve": [bundle, "--port", "0"],
        "bench": [bundle],
        "verify": [bundle],
        "report": [tiny_adapter, "--target", "t4", "-o", out],
        "calibrate": [tiny_adapter],
    }
    return {name: [str(part) for part in parts] for name, parts in lists.items()}


@pytest.fixture
def without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise ConfigError("here the work begins")

    for name in HEAVY:
        monkeypatch.setattr(name, stop)


def test_options_are_found() -> None:
    found = numeric()
    assert len(found) > 40
    for one in (
        (("plan",), "--memory"),
        (("run",), "--temperature"),
        (("train",), "--budgets"),
        (("bench",), "--prompt"),
    ):
        assert one in found


@pytest.mark.parametrize(
    ("path", "option"), numeric(), ids=lambda value: "-".join(value) if isinstance(value, tuple) else value
)
def test_a_hostile_number_is_one_line(
    path: tuple[str, ...], option: str, arguments: dict[str, list[str]], without_work: None
) -> None:
    for number in NUMBERS:
        result = CliRunner().invoke(cli, [*path, *arguments[path[-1]], option, number])
        if isinstance(result.exception, CoatError):
            said = str(result.exception)
            assert len(said.splitlines()) == 1 and len(said) < 2000, said
        else:
            assert result.exception is None or isinstance(result.exception, SystemExit), (number, result.exception)
            assert result.exit_code in (0, 2)


@pytest.mark.parametrize("limit", ["batch", "threads", "context"])
def test_ranges_are_named(limit: str, arguments: dict[str, list[str]], without_work: None) -> None:
    command = "bench" if limit == "batch" else "run"
    result = CliRunner().invoke(cli, [command, *arguments[command], f"--{limit}", "9" * 12])
    assert f"{limit} must be at most " in str(result.exception)


def test_near_temperature_0_the_likeliest_token_is_taken() -> None:
    logits = np.array([1, 3, 3e38, -3e38, 2], np.float32)
    for temperature in (5e-324, 1e-320, 1e-300):
        assert probabilities(logits, Sampling(temperature)).tolist() == [0, 0, 1, 0, 0]
        assert probabilities(logits, Sampling(temperature, top_k=2, top_p=0.5)).tolist() == [0, 0, 1, 0, 0]
        assert next_token(logits, Sampling(temperature), np.random.default_rng(0)) == 2
