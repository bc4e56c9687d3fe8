"""lm-eval's model "coatrt" against lm-eval's own for transformers, with the bundle's weights decoded."""

import json
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval, the extra eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import coatrt
from coatrt.bundle import Bundle
from coatrt.engines.measure.lm_eval_model import BundleLM
from coatrt.errors import BundleError, ConfigError
from support.decoded import save_decoded

QUESTIONS = [
    ("cat the cat sat on the", [" mat.", " hat.", " mat. dog", " "]),
    ("dog the dog sat on", [" the mat", " a", "\n"]),
    ("", ["owl the owl sat"]),
    ("x" * 80, ["y" * 30]),  # loses its beginning
]
TEXTS = ["cat the cat sat on the mat. " * 9, "owl"]
PAIRS = [(context, answer) for context, answers in QUESTIONS for answer in answers]


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def hf_of(tiny_bundle: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], HFLM]:
    made: dict[bool, HFLM] = {}

    def hf(lora: bool) -> HFLM:
        if lora not in made:
            directory = save_decoded(tiny_bundle, tiny_llama, tmp_path_factory.mktemp("hf") / "model", lora=lora)
            made[lora] = HFLM(str(directory), device="cpu", dtype="float32", batch_size=3, max_length=96)
        return made[lora]

    return hf


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> BundleLM:
    return BundleLM(tiny_bundle, accuracy_level=1, batch_size=3, max_length=96)


@pytest.mark.parametrize("lora", [True, False])
def test_likelihoods_are_those_of_lm_evals_transformers_model(
    tiny_bundle: Path, hf_of: Callable[[bool], HFLM], lora: bool
) -> None:
    choice = "own" if lora else None
    ours = BundleLM(tiny_bundle, accuracy_level=1, batch_size=3, max_length=96, lora=choice)
    theirs = hf_of(lora)
    assert ours.max_length == theirs.max_length == 96
    for one, other in zip(
        ours.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True),
        theirs.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True),
        strict=True,
    ):
        assert one[0] == pytest.approx(other[0], abs=1e-3)
        assert one[1] == other[1]
    rolling = requests("loglikelihood_rolling", *((text,) for text in TEXTS))
    found = ours.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert found == pytest.approx(theirs.loglikelihood_rolling(rolling, disable_tqdm=True), abs=1e-3)
    assert len(ours.tok_encode(TEXTS[0])) > 2 * ours.max_length  # several windows


def test_the_lora_and_the_accuracy_level_count(tiny_bundle: Path, model: BundleLM) -> None:
    pairs = requests("loglikelihood", *PAIRS)
    exact = np.array([value for value, _ in model.loglikelihood(pairs, disable_tqdm=True)])
    for arguments, least, most in (({"lora": "none"}, 0.1, 1e3), ({}, 1e-4, 2.0)):
        other = BundleLM(str(tiny_bundle), max_length=96, **arguments)
        found = np.array([value for value, _ in other.loglikelihood(pairs, disable_tqdm=True)])
        assert least < np.abs(found - exact).max() < most


def test_greedy_texts_are_those_of_lm_evals_transformers_model(model: BundleLM, hf_of: Callable[[bool], HFLM]) -> None:
    contexts = ["cat the", "owl the owl sat on the mat. ", "d", "x" * 90]
    free = {"until": [], "max_gen_toks": 24}
    texts = model.generate_until(requests("generate_until", *((c, free) for c in contexts)), disable_tqdm=True)
    wanted = hf_of(True).generate_until(requests("generate_until", *((c, free) for c in contexts)), disable_tqdm=True)
    assert texts == wanted
    assert len(set(texts)) > 1 and all(texts)
    text = texts[0]
    for until in (text[5:7], [text[9:12], text[4:6]]):
        stops = [until] if isinstance(until, str) else until
        (found,) = model.generate_until(
            requests("generate_until", (contexts[0], {"until": until, "max_gen_toks": 24})), disable_tqdm=True
        )
        assert found == text[: min(text.index(stop) for stop in stops)]


def test_a_stop_string_ends_the_work(model: BundleLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    decode = model._decoder.decode
    monkeypatch.setattr(model._decoder, "decode", lambda tokens: (steps.append(1), decode(tokens))[1])
    (text,) = model.generate_until(
        requests("generate_until", ("cat the", {"until": [], "max_gen_toks": 16})), disable_tqdm=True
    )
    assert len(steps) == 15
    steps.clear()
    model.generate_until(
        requests("generate_until", ("cat the", {"until": [text[2]], "max_gen_toks": 16})), disable_tqdm=True
    )
    assert len(steps) == text.index(text[2])


def test_sampled_texts_follow_the_seed_and_differ_among_requests(tiny_bundle: Path) -> None:
    drawn = {"do_sample": True, "temperature": 5.0, "top_k": 200, "until": [], "max_gen_toks": 12}
    same = requests("generate_until", *(("cat the", drawn) for _ in range(5)))
    first, again, other = (
        BundleLM(tiny_bundle, seed=seed).generate_until(same, disable_tqdm=True) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(set(first)) == 5
    greedy = {**drawn, "do_sample": False}
    found = BundleLM(tiny_bundle).generate_until(
        requests("generate_until", *(("cat the", greedy) for _ in range(2))), disable_tqdm=True
    )
    assert len(set(found)) == 1


def test_conversations_are_rendered_as_lm_evals_transformers_model_does(
    model: BundleLM, hf_of: Callable[[bool], HFLM]
) -> None:
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is ice cold? "}]
    open_end = [*history, {"role": "assistant", "content": "I think it "}]
    for messages, prompt in ((history, True), (open_end, False)):
        text = model.apply_chat_template(messages, add_generation_prompt=prompt)
        assert text == hf_of(True).apply_chat_template(messages, add_generation_prompt=prompt)
    assert text.endswith("[assistant] I think it ")
    assert open_end[-1]["content"] == "I think it "  # the caller's messages are left alone
    assert model.chat_template(True) == hf_of(True).tokenizer.chat_template


def test_tokens_are_those_of_transformers(tiny_bundle: Path, model: BundleLM, hf_of: Callable[[bool], HFLM]) -> None:
    for text in ("cat", "", "<|end|>cat", " naïve"):
        for special in (None, True, False):
            assert model.tok_encode(text, add_special_tokens=special) == hf_of(True).tok_encode(
                text, add_special_tokens=special
            )
    assert model.prefix_token_id == model.eot_token_id == hf_of(True).prefix_token_id == 256
    assert BundleLM(tiny_bundle, prefix_token_id=7).prefix_token_id == 7


def test_wrong_arguments_are_refused_in_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"lorra": "none"}, "unknown argument lorra of the model coatrt; it has bundle, lora, backend"),
        ({"lora": "x.safetensors"}, "LoRA x.safetensors does not exist"),
        ({"backend": "vulkan"}, "backend must be one of ort, trt, cuda, got 'vulkan'"),
        ({"accuracy_level": 2}, "accuracy_level must be one of 0, 1, 4, got 2"),
        ({"batch_size": "many"}, "batch_size must be a whole number of at least 1, got 'many'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"max_length": 1}, "max_length must be a whole number of at least 2, got 1"),
        ({"max_length": 9000}, "max_length must be at most 8192 for this bundle, got 9000"),
        ({"max_gen_toks": 2.5}, "max_gen_toks must be a whole number of at least 1, got 2.5"),
        ({"seed": -1}, "seed must be at least 0"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ConfigError, match=f"^{message}"):
            BundleLM(tiny_bundle, **arguments)
    with pytest.raises(ConfigError, match=r"^no bundle; give --model_args bundle=DIRECTORY$"):
        BundleLM()
    with pytest.raises(BundleError, match="not a bundle"):
        BundleLM(tmp_path)
    assert BundleLM(tiny_bundle, batch_size="auto", device="cuda:0").batch_size == 8


def test_wrong_generation_arguments_are_refused_in_one_line(model: BundleLM) -> None:
    for arguments, message in (
        ({"num_beams": 4}, "num_beams must be 1"),
        ({"typical_p": 0.5}, "generation argument typical_p is unknown; allowed: until, max_gen_toks, do_sample, "),
        ({"logit_bias": {"1": 2.0}}, "generation argument logit_bias is unknown"),
        ({"do_sample": False, "repetition_penalty": -1.0}, "the repetition penalty must be"),
        ({"do_sample": True, "temperature": -1.0}, "temperature must be 0 or a positive number"),
        ({"do_sample": True, "temperature": 1.0, "top_k": "few"}, "generation arguments must be numbers"),
        ({"max_gen_toks": 96}, "max_gen_toks must be less than max_length, 96, got 96"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            model.generate_until(requests("generate_until", ("cat", arguments)), disable_tqdm=True)
    with pytest.raises(ConfigError, match=r"^an answer has 97 tokens, it may have 1 to 96; give a larger max_length$"):
        model.loglikelihood(requests("loglikelihood", ("cat", "y" * 97)), disable_tqdm=True)


def test_a_bundle_without_a_chat_template_is_refused(model: BundleLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="no chat template; leave out --apply_chat_template"):
        model.apply_chat_template([{"role": "user", "content": "Is ice cold?"}])


def test_the_results_name_the_bundle(tiny_bundle: Path, model: BundleLM) -> None:
    info = model.get_model_info()
    assert info["coatrt_configuration"] == Bundle.open(tiny_bundle).config.hash
    assert (info["coatrt_lora"], info["coatrt_accuracy_level"]) == ("own", 1)
    json.dumps(info)


def test_lm_eval_finds_the_model_by_its_entry_point() -> None:
    (found,) = (point for point in entry_points(group="lm_eval.models") if point.name == "coatrt")
    assert found.load() is BundleLM is coatrt.BundleLM
