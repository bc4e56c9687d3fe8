"""Tokenizers in GGUF: the tokens of the original, and llama.cpp's name of the way text is split."""

import json
from pathlib import Path
from typing import Any

import pytest

from coatrt.errors import CheckpointError
from coatrt.export.checkpoints.gguf_tokenizer import check_tokenizer, write_tokenizer

gguf = pytest.importorskip("gguf", reason="needs the gguf extra")

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def save_bpe(directory: Path, splitter: Any) -> None:
    """Save a byte-level BPE tokenizer with merges, a special token and an added word."""
    from tokenizers import Tokenizer, decoders, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    words = ["the cat sat on the mat, 1234 times; don't ask — naïve ☃"] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ x }}"})
    )
    (directory / "config.json").write_text('{"model_type": "llama"}')


def splitters() -> dict[str, Any]:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    plain, bytes_only = ByteLevel(add_prefix_space=False), ByteLevel(add_prefix_space=False, use_regex=False)
    return {
        "gpt-2": plain,
        "smollm": Sequence([Digits(individual_digits=True), plain]),
        "llama-bpe": Sequence([Split(Regex(LLAMA3), "isolated"), bytes_only]),
        "qwen2": Sequence([Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"), bytes_only]),
    }


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_tokens_merges_and_splitting(tmp_path: Path, name: str) -> None:
    save_bpe(tmp_path, splitters()[name])
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    write_tokenizer(writer, tmp_path, 330)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == name
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert {tokens[index]: index for index in content["model"]["vocab"].values()} == content["model"]["vocab"]
    assert kinds[tokens.index("<|end|>")] == 3
    assert kinds[tokens.index("<tool>")] == 4
    assert tokens[-1] == "[PAD329]"
    assert kinds[-1] == 5
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in content["model"]["merges"]]
    assert fields["tokenizer.ggml.eos_token_id"] == tokens.index("<|end|>")
    assert fields["tokenizer.chat_template"] == "{{ x }}"
    with pytest.raises(CheckpointError, match="tokens and an embedding of 200 rows"):
        write_tokenizer(gguf.GGUFWriter(str(tmp_path / "n.gguf"), "llama"), tmp_path, 200)


def test_other_splittings_are_refused(tmp_path: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Punctuation, Sequence

    save_bpe(tmp_path, Sequence([Punctuation(), ByteLevel(add_prefix_space=False)]))
    with pytest.raises(CheckpointError, match=r"llama.cpp has no name for the way .*Punctuation"):
        check_tokenizer(tmp_path)


def test_a_sentencepiece_model_keeps_pieces_scores_and_types(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the gguf extra")
    (tmp_path / "text").write_text("the cat sat on the mat, 1234 times; don't ask — naïve\n" * 40)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    added = [{"id": 300, "content": "<|tool|>", "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}, "added_tokens": added}))
    check_tokenizer(tmp_path)
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    write_tokenizer(writer, tmp_path, 304)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert fields["tokenizer.ggml.model"] == "llama"
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    kinds = fields["tokenizer.ggml.token_type"]
    assert tokens[:300] == [processor.id_to_piece(i) for i in range(300)]
    assert scores[:300] == [processor.get_score(i) for i in range(300)]
    assert kinds[:3] == [2, 3, 3]  # unknown, start, end
    assert kinds[tokens.index("<0x41>")] == 6
    assert (tokens[300], kinds[300], kinds[303]) == ("<|tool|>", 3, 5)
    assert fields["tokenizer.ggml.eos_token_id"] == 2
