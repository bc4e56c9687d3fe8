"""Examples, and losses over them, against transformers' own numbers row by row."""

from pathlib import Path

import pytest
import torch

from coatrt.data.examples import IGNORED, Examples
from coatrt.errors import ConfigError
from coatrt.evaluation import losses
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import log_likelihoods, mean_loss
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.modules import load_model
from coatrt.quantization.code_cache import CodeStore

# Lengths and targets differ: a whole row, an answer at the end, two answers with a gap, one token.
ROWS = [
    (list(range(5, 25)), [False] + [True] * 19),
    (list(range(40, 52)), [False] * 9 + [True] * 3),
    (list(range(60, 78)), [False] * 4 + [True] * 2 + [False] * 5 + [True] * 3 + [False] * 4),
    ([9, 8, 7], [False, False, True]),
]


@pytest.fixture(scope="module")
def models(tiny_llama: Path) -> tuple[FakeQuantModel, object]:
    checkpoint = Checkpoint.open(tiny_llama)
    return FakeQuantModel(checkpoint, CodeStore(checkpoint)), load_model(checkpoint)


def alone(model: object, row: tuple[list[int], list[bool]]) -> torch.Tensor:
    """Return the loss of each target of a row from transformers, without batch or padding."""
    tokens, marks = (torch.tensor(part) for part in row)
    with torch.no_grad():
        logits = model(input_ids=tokens[None]).logits[0].double()  # type: ignore[operator]
    places = marks.nonzero().squeeze(1)
    return -logits.log_softmax(-1)[places - 1, tokens[places]]


def test_text_blocks_have_the_loss_of_transformers(
    models: tuple[FakeQuantModel, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = models
    blocks = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = torch.nn.functional.cross_entropy(
            theirs(input_ids=blocks).logits[:, :-1].reshape(-1, 272),  # type: ignore[operator]
            blocks[:, 1:].reshape(-1),
        )
        labels = theirs(input_ids=blocks, labels=blocks).loss.item()  # type: ignore[operator]
        assert ours.loss(Examples.of_blocks(blocks)).item() == plain.item()
    assert plain.item() == pytest.approx(labels, rel=1e-6)
    monkeypatch.setattr(losses, "_ROWS", 2)
    assert mean_loss(ours, Examples.of_blocks(blocks)) == pytest.approx(labels, rel=1e-6)


def test_padded_batches_give_the_numbers_of_single_rows(
    models: tuple[FakeQuantModel, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = models
    examples = Examples.of_rows(ROWS)
    single = [alone(theirs, row) for row in ROWS]
    everything = torch.cat(single).mean().item()
    with torch.no_grad():
        assert ours.loss(examples).item() == pytest.approx(everything, rel=1e-5)
    for batch in (1, 3, 8):
        monkeypatch.setattr(losses, "_ROWS", batch)
        monkeypatch.setattr(losses, "_DISTINCT_ROWS", batch)
        assert mean_loss(ours, examples) == pytest.approx(everything, rel=1e-5)
        sums = log_likelihoods(ours, examples)
        assert sums.tolist() == pytest.approx([-row.sum().item() for row in single], rel=1e-5)
    wild = Examples(examples.tokens.where(torch.arange(20) <= examples.last[:, None], 33), examples.targets)
    assert mean_loss(ours, wild) == pytest.approx(everything, rel=1e-5)  # whatever stands for padding


def test_rows_that_see_the_same_tokens_are_computed_once(
    models: tuple[FakeQuantModel, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = models
    rows = [([7, 0, choice], [False, False, True]) for choice in (1, 2, 3)] + [([7, 0], [False, True])]
    seen = []
    logits = FakeQuantModel.logits
    monkeypatch.setattr(FakeQuantModel, "logits", lambda self, *a: seen.append(a[0].shape) or logits(self, *a))
    found = log_likelihoods(ours, Examples.of_rows(rows))
    assert seen == [(1, 2)]
    assert found.tolist() == pytest.approx([-alone(theirs, row).sum().item() for row in rows], rel=1e-5)


def test_what_is_no_example_is_refused() -> None:
    tokens = torch.arange(6).view(2, 3)
    marked = torch.tensor([[IGNORED, 1, 2], [IGNORED, IGNORED, 5]])
    examples = Examples(tokens, marked)
    assert (len(examples), examples.target_count, examples.counts.tolist(), examples.last.tolist()) == (
        2,
        3,
        [2, 1],
        [2, 2],
    )
    assert examples.digest == Examples(tokens.clone(), marked.clone()).digest
    assert examples.digest != examples[:1].digest
    assert examples.digest != Examples.of_blocks(tokens).digest
    for targets, said in (
        (marked[:, :2], "must have the same shape"),
        (marked.int(), "must be int64"),
        (torch.tensor([[IGNORED, 1, 1], [IGNORED, 4, 5]]), "a target must be its token"),
        (tokens, "first token of a row"),
        (torch.tensor([[IGNORED, 1, 2], [IGNORED] * 3]), "has no target"),
    ):
        with pytest.raises(ConfigError, match=said):
            Examples(tokens, targets)
