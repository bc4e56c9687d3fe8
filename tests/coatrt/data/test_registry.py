"""Tasks from files: splits, one clear line for every wrong one, training on a choice task, and the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from coatrt.adapter.adapter import Adapter
from coatrt.cli.main import cli
from coatrt.data.registry import load_task
from coatrt.data.text import text_task
from coatrt.errors import ConfigError
from coatrt.models.tokenizer import load_tokenizer
from coatrt.training.run import train
from support.tiny import TEXTS, tiny_options

SOUNDS = {"cat": " purrs", "dog": " barks", "hen": " clucks", "owl": " hoots"}


def question(i: int) -> dict[str, Any]:
    animal = list(SOUNDS)[i % 4]
    return {"prompt": f"{i:02} the {animal}", "choices": list(SOUNDS.values()), "answer": i % 4}


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with a file of each kind."""
    (tmp_path / "text").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{i:02}.txt").write_text(text)
    write(tmp_path / "choice.jsonl", [question(i) for i in range(60)])
    talks: list[Any] = [
        {"messages": [{"role": "user", "content": f"{i} {a}"}, {"role": "assistant", "content": s}]}
        for i, (a, s) in enumerate(list(SOUNDS.items()) * 3)
    ]
    write(
        tmp_path / "chat.jsonl",
        [*talks, {"prompt": "owl", "completion": "hoots"}, {"prompt": "x" * 99, "completion": "y"}],
    )
    return tmp_path


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_every_tenth_line_is_held_out(files: Path, tokenizer: Any) -> None:
    data = load_task("choice", [files / "choice.jsonl"], tokenizer, 32)
    assert (len(data.train), len(data.held_out), data.dropped) == (54, 6, 0)
    assert data.choices is not None
    assert data.choices.answers.tolist() == [0, 2, 0, 2, 0, 2]
    assert tokenizer.decode(data.held_out.tokens[1].tolist()).startswith("10 the hen clucks")
    lines = (files / "choice.jsonl").read_text().split("\n")
    (files / "parts").mkdir()
    (files / "parts" / "b.jsonl").write_text("\n\n".join(lines[20:]))
    (files / "parts" / "a.jsonl").write_text("\n".join(lines[:20]))
    assert load_task("choice", [files / "parts"], tokenizer, 32).digest == data.digest
    few = write(files / "few.jsonl", [question(i) for i in range(3)])
    assert (len((small := load_task("choice", [few], tokenizer, 32)).train), len(small.held_out)) == (2, 1)
    given = load_task("choice", [few], tokenizer, 32, held_out=[files / "choice.jsonl"])
    assert (len(given.train), len(given.held_out)) == (3, 60)
    assert len({small.digest, given.digest, data.digest}) == 3


def test_text_and_chat_files(files: Path, tokenizer: Any) -> None:
    text = load_task("text", [files / "text"], tokenizer, 32)
    blocks = text_task(tokenizer, TEXTS, 32)
    assert text.digest == blocks.digest
    assert torch.equal(text.held_out.targets[:, 1:], text.held_out.tokens[:, 1:])
    calls: list[tuple[int, int]] = []
    chat = load_task(
        "chat", [files / "chat.jsonl"], tokenizer, 64, progress=lambda done, total, *_: calls.append((done, total))
    )
    assert calls == [*((i, 12) for i in range(1, 13)), (1, 2), (2, 2)]
    assert (len(chat.train), len(chat.held_out), chat.dropped) == (11, 2, 1)
    assert chat.choices is None


WRONG: dict[str, tuple[str, list[Any], str]] = {
    "not JSON": ("choice", [question(0), '{"prompt": '], r"x\.jsonl line 2 is not JSON"),
    "no object": ("chat", ["", "[1]"], r"x\.jsonl line 2 is a list; give one JSON object per line"),
    "nothing": ("choice", [" ", ""], "no lines in"),
    "one line": ("choice", [question(0)], "give at least two"),
    "no answer": ("choice", [question(0), {"prompt": "a", "choices": [" b", " c"]}], "line 2 has no 'answer'"),
    "answer out of range": (
        "choice",
        [question(0), {**question(1), "answer": 4}],
        "line 2: answer must be an index from 0 to",
    ),
    "negative answer": ("choice", [question(0), {**question(1), "answer": -1}], "line 2: answer must be"),
    "answer a text": ("choice", [{**question(0), "answer": "b"}], "index of the right choice, from 0, got 'b'"),
    "answer a truth": ("choice", [{**question(0), "answer": True}], "from 0, got True"),
    "choices a text": ("choice", [{**question(0), "choices": "ab"}], "choices must be a list of texts, got str"),
    "empty choice": ("choice", [{**question(0), "choices": ["a", ""]}], "a choice must be a text and not empty, got"),
    "prompt a number": ("choice", [{**question(0), "prompt": 3}], "line 1: prompt must be a text and not empty, got 3"),
    "nothing fits": ("choice", [{**question(0), "prompt": "a" * 99}] * 2, "none of 1 questions to train on fits"),
    "chat keys": ("chat", [{"text": "a"}], "line 1 has no 'prompt'; a chat line has messages"),
    "no completion": ("chat", [{"prompt": "a"}], "line 1 has no 'completion'"),
    "messages a text": ("chat", [{"messages": "a"}], "line 1: messages must be a list of objects"),
    "no role": ("chat", [{"messages": [{"content": "a"}]}], "line 1 has a message without role"),
    "content a number": ("chat", [{"messages": [{"role": "user", "content": 1}]}], "content must be a text"),
    "no assistant": ("chat", [{"messages": [{"role": "user", "content": "a"}]}], "line 1 has no message of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_lines_name_file_and_line(case: str, tokenizer: Any, tmp_path: Path) -> None:
    kind, lines, said = WRONG[case]
    with pytest.raises(ConfigError, match=said) as caught:
        load_task(kind, [write(tmp_path / "x.jsonl", lines)], tokenizer, 32)
    assert "\n" not in str(caught.value)


def test_wrong_files_kinds_and_lengths_are_refused(files: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl does not exist"):
        load_task("chat", [files / "none.jsonl"], tokenizer, 32)
    (files / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.jsonl is UTF-16 \(it begins with"):
        load_task("chat", [files / "binary.jsonl"], tokenizer, 32)
    with pytest.raises(ConfigError, match="unknown task 'poem'; allowed: text, chat, choice"):
        load_task("poem", [files], tokenizer, 32)
    with pytest.raises(ConfigError, match="max length must be at least 2 tokens and at most 1048576, got 1"):
        load_task("chat", [files / "chat.jsonl"], tokenizer, 1)


def test_training_raises_the_accuracy_of_a_choice_task(files: Path, tiny_llama: Path, tokenizer: Any) -> None:
    held_out = write(files / "held-out.jsonl", [question(i) for i in range(60, 72)])
    data = load_task("choice", [files / "choice.jsonl"], tokenizer, 32, held_out=[held_out])
    options = tiny_options(steps=60, batch=8, evaluation=12, formats=("nf4-g32", "int8"), checkpoint_every=60)
    adapter = train(tiny_llama, data, files / "out", options)
    found = adapter.description.metrics["held_out"]
    row = found["budgets"][0]
    assert found["full_precision_accuracy"] <= 0.6
    assert row["without_accuracy"] <= 0.6
    assert row["adapted_accuracy"] >= 0.9
    assert row["adapted"] < row["without"] / 2
    assert adapter.description.metrics["held_out_examples"] == 12
    assert adapter.description.metrics["task"] == "choice"
    assert (
        train(tiny_llama, data, files / "out", options, resume=True).description.metrics == adapter.description.metrics
    )
    other = load_task("choice", [files / "choice.jsonl"], tokenizer, 32)
    with pytest.raises(ConfigError, match="other data"):
        train(tiny_llama, other, files / "out", options, resume=True)


@pytest.mark.parametrize(("task", "data"), [("text", "text"), ("chat", "chat.jsonl"), ("choice", "choice.jsonl")])
def test_the_command_trains_on_every_kind(task: str, data: str, files: Path, tiny_llama: Path) -> None:
    arguments = [
        "train",
        tiny_llama,
        "--task",
        task,
        "--data",
        files / data,
        "-o",
        files / "out",
        "--formats",
        "int4-g32,int8",
        "--steps",
        2,
        "--batch",
        2,
        "--max-length",
        40,
        "--calibration",
        2,
        "--budgets",
        "5",
    ]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    metrics = Adapter.from_pretrained(files / "out").description.metrics
    assert metrics["task"] == task
    assert f"held-out perplexity over {metrics['held_out_tokens']} tokens" in result.output
    assert ("held-out accuracy over 6 questions" in result.output) == (task == "choice")
    assert ("dropped        1 lines longer than 40 tokens" in result.output) == (task == "chat")
