"""Help texts: short, readable in 80 columns, with examples that parse and, where that is cheap, run."""

import importlib.util
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner

from coatrt.cli.help import Command, Group, documented
from coatrt.cli.main import cli
from coatrt.devices.profiles import device_profile
from support.tiny import TEXTS

ROOT = Path(__file__).resolve().parents[3]


def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "docs" / "cli_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = reference()
COMMANDS: dict[str, click.Command] = dict(REFERENCE.commands())
EXAMPLES = [
    (path, line)
    for path, command in COMMANDS.items()
    if isinstance(command, Command | Group)
    for line in command.examples
]


def arguments(line: str) -> list[str]:
    """Return the words behind `coatrt` in a command line."""
    words = shlex.split(line)
    return words[words.index("coatrt") + 1 :]


def parsed(words: Sequence[str]) -> click.Context:
    """Return the context of the command that words name, every value converted.

    Raises:
        UsageError: no such command or option, or a wrong value.
    """
    path, rest = "coatrt", list(words)
    while rest and f"{path} {rest[0]}" in COMMANDS:
        path = f"{path} {rest.pop(0)}"
    if isinstance(COMMANDS[path], Group) and rest and not rest[0].startswith("-"):
        raise click.UsageError(f"no command {rest[0]}")
    return COMMANDS[path].make_context(path, rest, parent=click.Context(cli, **cli.context_settings))


def test_every_command_has_examples() -> None:
    assert len(COMMANDS) == 18
    for path, command in COMMANDS.items():
        assert isinstance(command, Command | Group), path
        assert 2 <= len(command.examples) <= 4, path
        assert len(set(command.examples)) == len(command.examples), path
        assert all(path in line for line in command.examples), path


@pytest.mark.parametrize(("path", "line"), EXAMPLES, ids=lambda value: value if value.startswith("coatrt ") else None)
def test_an_example_parses_and_names_devices_that_exist(path: str, line: str) -> None:
    context = parsed(arguments(line))
    named = [*context.params.get("devices", ()), context.params.get("profile")]
    for name in filter(None, named):
        assert device_profile(name).id == name


def test_a_wrong_example_would_be_found() -> None:
    for line in ("coatrt plan a", "coatrt plan a --target l4 --bits four", "coatrt bench b --tokenz 3", "coatrt pla"):
        with pytest.raises(click.UsageError):
            parsed(arguments(line))


@pytest.mark.parametrize("path", COMMANDS)
def test_help_is_readable(path: str) -> None:
    shown = CliRunner().invoke(cli, [*path.split()[1:], "--help"], terminal_width=78).output
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 79, max(lines, key=len)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]|\\b", shown)  # a docstring's control characters
    assert "RANGE" not in shown and "TEXT]" not in shown
    assert lines[2].strip(), "what the command does comes first"
    assert shown.index("\nExamples:\n") < shown.index("\nOptions:\n")
    options = shown.partition("\nOptions:\n")[2].partition("\n\n")[0]
    least = 1 if path == "coatrt lm-eval" else 2  # its options are those of another program
    assert least <= len(re.findall(r"^  -", options, re.MULTILINE)) <= 13


def test_the_list_of_commands_says_what_their_help_says() -> None:
    listed = CliRunner().invoke(cli, ["--help"], terminal_width=120).output
    for name in cli.list_commands(click.Context(cli)):
        sentence = COMMANDS[f"coatrt {name}"].get_short_help_str(limit=100)
        assert re.search(rf"^  {name} +{re.escape(sentence)}\.?$", listed, re.MULTILINE), (name, sentence)
    order = [listed.index(f"\n  {name} ") for name in ("train", "plan", "build", "verify", "run", "bench", "report")]
    assert order == sorted(order) and order[-1] < listed.index("\nMore commands:")


def test_the_options_used_most_come_first_and_none_is_lost() -> None:
    @documented(examples=("coatrt x",), first=("much", "also"), terms=("Words", (("a", "is b"),)))
    @click.option("--rarely", default=1)
    @click.option("--also", type=click.IntRange(1, 5), default=2, show_default=True)
    @click.option("--much")
    def command(**_: object) -> None:
        """Do it."""

    shown = CliRunner().invoke(command, ["--help"]).output
    flags = re.findall(r"^  (?:-h, )?(--\w+)", shown, re.MULTILINE)
    assert flags == ["--much", "--also", "--rarely", "--help"]
    assert shown.index("More options:") < shown.index("--rarely") < shown.index("Words:")
    assert "[default: 2" in shown and "a  is b" in shown
    assert "\nExamples:\n  coatrt x\n" in shown
    with pytest.raises(AssertionError, match="has no option nothing"):
        documented(examples=(), first=("nothing",))(lambda: None)


def test_defaults_are_shown() -> None:
    for path, texts in {
        "run": ("[default: 64]", "[default: ort]", "[default: 2048]", "[default: all usable cores]"),
        "bench": ("[default: 16, 128]", "[default: 32]", "[default: 5]"),
        "plan": ("[default: quality]", "[default: none; for latency 0.05]", "[default: the device's]"),
        "search": ("[default: 60]", "[default: cpu]", "[default: (8; for chat and choice 64)]"),
    }.items():
        shown = " ".join(CliRunner().invoke(cli, [path, "--help"]).output.split())
        for text in texts:
            assert text in shown, (path, text)


def test_the_reference_is_what_help_shows() -> None:
    assert REFERENCE.PAGE.read_text(encoding="utf-8") == REFERENCE.page(), "run python docs/cli_reference.py"
    shown = CliRunner().invoke(cli, ["train", "--help"], terminal_width=78, prog_name="coatrt").output
    assert f"## coatrt train\n\n```text\n{shown}```\n" in REFERENCE.page()


COSTLY = {"train", "search", "calibrate", "--key", "cuda", "lm-eval", "serve"}
"""Examples with one of these words are parsed only: they train, take minutes, or need a key, a GPU or a download."""


@pytest.fixture(scope="module")
def place(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("examples")
    shutil.copytree(tiny_adapter, here / "adapter")
    (here / "texts").mkdir()
    (here / "texts" / "a.txt").write_text("\n".join(TEXTS))
    (here / "prompt.txt").write_text("the cat\n")
    return here


def test_examples_run_as_written_one_after_another(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the help: what an example writes, a later one reads."""
    monkeypatch.chdir(place)
    ran = []
    for _, line in EXAMPLES:
        words = arguments(line)
        if COSTLY & set(words):
            continue
        if words[0] == "build":
            words += ["--no-engine", "--overwrite"]
        result = CliRunner().invoke(cli, words, input="the owl\n", catch_exceptions=False)
        assert result.exit_code == 0, (line, result.output)
        ran.append(words[0])
    assert {"plan", "build", "verify", "run", "bench", "report", "devices", "adapt", "export", "cmake-dir"} <= set(ran)
    for written in ("plan.json", "bundles/l4", "bundles/rtx-4060", "report.html", "figures", "lora", "exported"):
        assert os.path.exists(written), written  # noqa: PTH110 - relative to the changed directory
