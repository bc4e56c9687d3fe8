"""A tokenizer in the keys of GGUF: byte-level BPE, and SentencePiece where its own file is there."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coatrt.errors import CheckpointError
from coatrt.models.tokenizer_files import read_json

__all__ = ["check_tokenizer", "write_tokenizer"]

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # types of llama.cpp
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}  # expression → llama.cpp's name of it


def check_tokenizer(directory: Path) -> None:
    """Refuse a tokenizer that llama.cpp would read differently.

    Raises:
        CheckpointError: it is neither byte-level BPE of a known splitting nor SentencePiece.
    """
    if not (directory / "tokenizer.model").is_file():
        _splitting(directory, read_json(directory / "tokenizer.json"))


def write_tokenizer(writer: Any, directory: Path, vocabulary: int) -> None:
    """Add the keys of a model's tokenizer to a GGUF writer.

    Args:
        writer: the GGUFWriter.
        directory: directory of the model.
        vocabulary: rows of the embedding; ids without a token are marked as unused.

    Raises:
        CheckpointError: see `check_tokenizer`; or it has more tokens than the embedding has rows.
    """
    import gguf

    sentence_piece = directory / "tokenizer.model"
    if sentence_piece.is_file():
        rows, has_merges = list(_pieces(sentence_piece, directory)), False
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
    else:
        content = read_json(directory / "tokenizer.json")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(directory, content))
        rows = [(token, 0.0, kind) for token, kind in _byte_level(content)]
        has_merges = bool(content["model"].get("merges"))
    if len(rows) > vocabulary:
        raise CheckpointError(
            f"{directory} has {len(rows)} tokens and an embedding of {vocabulary} rows; GGUF needs a row for each"
        )
    rows += [(f"[PAD{i}]", -10000.0, _UNUSED) for i in range(len(rows), vocabulary)]
    writer.add_token_list([token for token, _, _ in rows])
    if sentence_piece.is_file():
        writer.add_token_scores([score for _, score, _ in rows])
    writer.add_token_types([kind for _, _, kind in rows])
    special = gguf.SpecialVocab(directory, load_merges=has_merges, n_vocab=vocabulary)
    special.add_to_gguf(writer, quiet=True)


def _splitting(directory: Path, content: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rule that splits text before BPE."""
    model, splitter = content.get("model") or {}, content.get("pre_tokenizer") or {}
    parts = splitter.get("pretokenizers", [splitter]) if isinstance(splitter, dict) else []
    kinds = [part.get("type") for part in parts if isinstance(part, dict)]
    name = ""
    if model.get("type") == "BPE" and not model.get("byte_fallback") and kinds[-1:] == ["ByteLevel"]:
        by_regex = parts[-1].get("use_regex", True)
        if parts[-1].get("add_prefix_space"):
            name = ""
        elif kinds == ["ByteLevel"] and by_regex:
            name = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and by_regex:
            name = "smollm"
        elif kinds == ["Split", "ByteLevel"] and not by_regex:
            name = _PATTERNS.get((parts[0].get("pattern") or {}).get("Regex", ""), "")
    if not name:
        raise CheckpointError(
            f"{directory}: llama.cpp has no name for the way its tokenizer splits text "
            f"({json.dumps(splitter)[:120]}); convert the model with llama.cpp's own convert_hf_to_gguf.py"
        )
    return name


def _byte_level(content: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield (token, type) by id."""
    by_id = {index: (token, _NORMAL) for token, index in content["model"]["vocab"].items()}
    for added in content.get("added_tokens") or []:
        by_id[added["id"]] = (added["content"], _CONTROL if added.get("special") else _USER)
    for index in range(max(by_id) + 1):
        yield by_id.get(index, (f"[PAD{index}]", _UNUSED))


def _pieces(path: Path, directory: Path) -> Iterator[tuple[str, float, int]]:
    """Yield (piece, score, type) by id of a SentencePiece model and the tokens added to it."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    processor.LoadFromFile(str(path))
    added = {}
    if (directory / "tokenizer.json").is_file():
        added = {one["id"]: one for one in read_json(directory / "tokenizer.json").get("added_tokens") or []}
    size = processor.vocab_size()
    for index in range(max([size - 1, *added]) + 1):
        if index in added and index >= size:
            one = added[index]
            yield one["content"], -1000.0, _CONTROL if one.get("special") else _USER
        elif index >= size:
            yield f"[PAD{index}]", -10000.0, _UNUSED
        else:
            kind = _UNKNOWN if processor.IsUnknown(index) else _CONTROL if processor.IsControl(index) else _NORMAL
            kind = _UNUSED if processor.IsUnused(index) else _BYTE if processor.IsByte(index) else kind
            yield processor.IdToPiece(index), float(processor.GetScore(index)), kind
