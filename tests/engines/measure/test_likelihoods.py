"""Likelihoods of a bundle's decoder against transformers with the decoded weights."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from coatrt.bundle import Bundle
from coatrt.engines.measure import likelihoods as module
from coatrt.engines.measure.likelihoods import Likelihood, Passage, likelihoods
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.engines.runtime.ort import OrtDecoder
from coatrt.errors import BundleError, ConfigError
from support.decoded import save_decoded

TEXT = tuple(b"cat the cat sat on the mat. dog the dog sat on the mat. owl")
PASSAGES = [
    Passage(TEXT[:20], 1),
    Passage(TEXT[:26], 7),  # its inputs extend those of the first
    Passage((*TEXT[:19], 7), 1),  # the same inputs as the first
    Passage((*TEXT[:20], 9, 8, 5), 3),
    Passage(TEXT[:2], 1),
    Passage(TEXT, len(TEXT) - 1),
    Passage(TEXT[30:45], 4),
]


def decoder_of(bundle: Path, batch: int, level: int = 0) -> OrtDecoder:
    opened = Bundle.open(bundle)
    decoder = load_decoder(opened, batch=batch, context=96, accuracy_level=level)
    assert isinstance(decoder, OrtDecoder)
    decoder.set_lora(load_lora(opened.path("lora.safetensors"), opened.contract))
    return decoder


@pytest.fixture(scope="module")
def decoded(tiny_bundle: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoded(tiny_bundle, tiny_llama, tmp_path_factory.mktemp("decoded") / "model", lora=True)


@pytest.fixture(scope="module")
def expected(decoded: Path) -> list[Likelihood]:
    model = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float64)
    answers = []
    for passage in PASSAGES:
        with torch.no_grad():
            logits = model(torch.tensor([passage.tokens[:-1]])).logits[0, -passage.scored :]
        tokens = torch.tensor(passage.tokens[-passage.scored :])
        chosen = torch.log_softmax(logits, -1).gather(1, tokens[:, None])
        answers.append(Likelihood(float(chosen.sum()), bool((logits.argmax(-1) == tokens).all())))
    return answers


@pytest.mark.parametrize("way", ["one pass", "token by token"])
@pytest.mark.parametrize("batch", [2, 4])
def test_likelihoods_are_those_of_transformers(
    tiny_bundle: Path, expected: list[Likelihood], batch: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "token by token":  # as on a GPU, whose decoders return one logit of a call
        monkeypatch.setattr(module, "OrtDecoder", dict)
    counts: list[int] = []
    found = likelihoods(decoder_of(tiny_bundle, batch), PASSAGES, counts.append)
    assert sum(counts) == len(PASSAGES)
    for one, other in zip(found, expected, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
        assert one.greedy == other.greedy


def test_greedy_says_whether_the_likeliest_tokens_are_the_scored_ones(tiny_bundle: Path) -> None:
    decoder = decoder_of(tiny_bundle, 2)
    first = int(decoder.prefill([TEXT[:9], TEXT[:9]])[0].argmax())
    second = int(decoder.decode([first, first])[0].argmax())
    passages = [Passage((*TEXT[:9], token, second), 2) for token in (first, (first + 1) % 256)]
    assert [one.greedy for one in likelihoods(decoder, passages)] == [True, False]


def test_passages_with_inputs_in_common_are_read_once(tiny_bundle: Path) -> None:
    decoder = decoder_of(tiny_bundle, 2)
    read: list[tuple[int, ...]] = []
    run = decoder.run

    def counted(tokens: np.ndarray, starts: np.ndarray, index: np.ndarray) -> np.ndarray:
        read.append(tokens.shape)
        return run(tokens, starts, index)

    decoder.run = counted  # type: ignore[method-assign]
    likelihoods(decoder, PASSAGES)
    lengths = [width for _, width in read]
    assert read == [(2, width) for width in lengths]
    # Two batches: the whole text, which serves five passages, with the one that ends in 9, 8, 5; then the last.
    assert lengths == [len(TEXT) - 1, 14]


def test_with_an_even_batch_no_score_depends_on_the_batch(tiny_bundle: Path) -> None:
    alone = decoder_of(tiny_bundle, 2, level=4)
    single = [likelihoods(alone, [passage])[0] for passage in PASSAGES]
    for batch in (2, 4, 8):
        assert likelihoods(decoder_of(tiny_bundle, batch, level=4), PASSAGES) == single


def test_what_cannot_be_scored_is_refused(tiny_bundle: Path) -> None:
    decoder = decoder_of(tiny_bundle, 2)
    for passage, message in (
        (Passage((1,), 1), "1 of 1 tokens are to be scored"),
        (Passage((1, 2), 0), "0 of 2 tokens are to be scored"),
        (Passage((1,) * 98, 1), "98 tokens is too long for 96 positions"),
        (Passage((1, 272), 1), "outside the vocabulary of 272"),
        (Passage((-1, 2), 1), "outside the vocabulary of 272"),
    ):
        with pytest.raises(ConfigError, match=message):
            likelihoods(decoder, [passage])
    assert likelihoods(decoder, [Passage((1,) * 97, 1)])
    lora = load_lora(tiny_bundle / "lora.safetensors", Bundle.open(tiny_bundle).contract)
    decoder.set_lora({name: np.full_like(value, 1e30) for name, value in lora.items()})
    with pytest.raises(BundleError, match="logits are not finite"), np.errstate(all="ignore"):
        likelihoods(decoder, PASSAGES)


def test_a_passage_is_what_it_says() -> None:
    passage = Passage((5, 6, 7, 8), 2)
    assert passage.inputs == (5, 6, 7)
    assert list(passage.positions) == [1, 2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        passage.scored = 3  # type: ignore[misc]
