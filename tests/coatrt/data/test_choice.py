"""Questions: rows, scores and accuracy against transformers, choice by choice without batch or padding."""

from pathlib import Path
from typing import Any

import pytest
import torch

from coatrt.data.choice import Question, choice_task
from coatrt.data.examples import IGNORED
from coatrt.data.task_data import ChoiceSets
from coatrt.errors import ConfigError
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import choice_scores, mean_loss, measure_held_out
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.modules import load_model
from coatrt.models.tokenizer import load_tokenizer
from coatrt.quantization.code_cache import CodeStore

QUESTIONS = [
    Question("Is a cat small?", (" yes", " no"), 0),
    Question("What sat on the mat, of all the animals there are? ", ("cat", "an owl", "nothing"), 2),
    Question("Sky:", (" blue", " green", " red", " grey"), 3),
    Question("Sky again:", (" red", " dark green"), 0),
]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def test_rows_are_prompt_and_right_choice(tokenizer: Any) -> None:
    data = choice_task(tokenizer, QUESTIONS, QUESTIONS[1:], 100)
    for i, question in enumerate(QUESTIONS):
        choice = question.choices[question.answer]
        whole = tokenizer(question.prompt + choice)["input_ids"]
        assert data.train.tokens[i, : len(whole)].tolist() == whole
        marked = data.train.targets[i][data.train.targets[i] != IGNORED].tolist()
        spaces = len(question.prompt) - len(question.prompt.rstrip(" "))
        assert marked == whole[-len(choice) - spaces :]  # spaces at a prompt's end belong to the choice
    assert data.choices is not None
    assert data.choices.answers.tolist() == [2, 3, 0]
    assert data.choices.owner.tolist() == [0] * 3 + [1] * 4 + [2] * 2
    width = data.train.tokens.shape[1]
    assert torch.equal(data.held_out.tokens[0, :width], data.train.tokens[1])


def test_scores_are_those_of_transformers_one_by_one(
    tiny_llama: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    ours, theirs = FakeQuantModel(checkpoint, CodeStore(checkpoint)), load_model(checkpoint)
    right, losses, count = 0, 0.0, 0
    best = []
    for question in QUESTIONS:
        scores = []
        prompt = question.prompt.rstrip(" ")
        for choice in question.choices:
            ids = torch.tensor(tokenizer(question.prompt + choice)["input_ids"])
            head = len(tokenizer(prompt)["input_ids"])
            with torch.no_grad():
                table = theirs(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            scores.append(table[torch.arange(head - 1, len(ids) - 1), ids[head:]].sum().item())
            if choice == question.choices[question.answer]:
                losses, count = losses - scores[-1], count + len(ids) - head
        best.append(max(range(len(scores)), key=scores.__getitem__))
        right += best[-1] == question.answer
    data = choice_task(tokenizer, QUESTIONS, QUESTIONS, 100)
    assert data.choices is not None
    for batch in (1, 2, 16):
        monkeypatch.setattr("coatrt.evaluation.losses._DISTINCT_ROWS", batch)
        found = choice_scores(ours, data.choices)
        assert found["accuracy"] == right / len(QUESTIONS)
        assert found["loss"] == pytest.approx(losses / count, rel=1e-5)
    assert measure_held_out(ours, data)["loss"] == pytest.approx(mean_loss(ours, data.held_out), rel=1e-6)
    for count in (1, 2, 3):
        found = measure_held_out(ours, data, limit=count)
        assert found["accuracy"] == sum(b == q.answer for b, q in zip(best[:count], QUESTIONS, strict=False)) / count
        assert found["loss"] == pytest.approx(mean_loss(ours, data.held_out[:count]), rel=1e-6)
    # With every answer replaced by what scored best, all are right: argmax goes by question.
    moved = ChoiceSets(data.choices.rows, data.choices.owner, torch.tensor(best))
    assert choice_scores(ours, moved)["accuracy"] == 1.0


def test_questions_that_are_too_long_are_dropped_and_counted(tokenizer: Any) -> None:
    data = choice_task(tokenizer, QUESTIONS, QUESTIONS, 22)
    assert (len(data.train), len(data.held_out), data.dropped) == (3, 3, 2)
    assert data.choices is not None
    assert len(data.choices) == 3
    with pytest.raises(ConfigError, match="none of 4 questions to train on fits into 5 tokens"):
        choice_task(tokenizer, QUESTIONS, QUESTIONS, 5)


def test_questions_that_cannot_be_scored_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="at least two different ones"):
        Question("a", (" b", " b"), 0)
    with pytest.raises(ConfigError, match="at least two different ones"):
        Question("a", (" b",), 0)
    with pytest.raises(ConfigError, match="answer must be an index from 0 to 1, got 2"):
        Question("a", (" b", " c"), 2)
    for choices in ((" per", " person"), (" person", " per")):
        question = Question("a", choices, 0, "x line 4")
        with pytest.raises(ConfigError, match="x line 4: the tokens of ' person' begin with those of ' per'"):
            choice_task(tokenizer, [question], [question], 100)
    with pytest.raises(ConfigError, match="the prompt has no tokens"):
        choice_task(tokenizer, [Question("  ", ("b", "c"), 0)], QUESTIONS, 100)
