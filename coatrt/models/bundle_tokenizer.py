"""A bundle's tokenizer, read by the library tokenizers alone: what transformers makes of the same files, without it."""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coatrt.errors import CheckpointError, reason
from coatrt.models.tokenizer import load_tokenizer
from coatrt.models.tokenizer_files import check_files, extra_templates, read_json, read_text
from coatrt.system.extras import require

__all__ = ["BundleTokenizer", "check_same", "open_tokenizer", "token_bytes"]

_CLEAN_UP = (  # transformers' own list
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
_PROBES = (
    "The state of our finances, in 1865, wasn't good; it's better today!",
    " leading and trailing ",
    "two  spaces,\ttabs\n\nand\r\nlines\n",
    "def f(x):\n    return x ** 2  # 3.14e-10, 1234567890",
    "naïve café Straße ﬁne Ⅷ ½ e\u0301 \u212b",
    "日本語のテキスト 中文 한국어 ไทย العربية עברית हिन्दी",
    "🙂👩\u200d👩\u200d👧 \U0001f1ea\U0001f1fa\u0000\u200b\ufeff\u2028",
    "don 't you 've we 're I 'm it 's . ? ! ,",
)


class BundleTokenizer:
    """A tokenizer.json with the settings beside it; it has what coatrt uses of a transformers tokenizer.

    Args:
        directory: where its files are.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        from tokenizers import Tokenizer

        directory = Path(directory)
        check_files(directory)
        path = directory / "tokenizer.json"
        read_json(path)
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain ones
            raise CheckpointError(f"{path} cannot be read ({reason(error)}); build the bundle again") from None
        settings = read_json(directory / "tokenizer_config.json") if _has_settings(directory) else {}
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = settings.get("split_special_tokens") is True
        self._cleans_up = _cleans_up(settings, type(self._tokenizer.model).__name__)
        self._is_byte_level = _has_byte_level(json.loads(self._tokenizer.to_str()).get("decoder"))
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.name_or_path = str(directory)
        self.special_tokens_map = _special_tokens(settings)
        self.chat_template: Any = _templates(directory, settings)

    def __call__(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[list[int]]]:
        """Return {"input_ids": the token ids of each text}.

        Args:
            texts: what to tokenize; special tokens in them count as such.
            add_special_tokens: whether the tokenizer adds its own, such as one for the start.
            verbose: as transformers has it; nothing is printed.
        """
        rows = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return {"input_ids": [row.ids for row in rows]}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of token ids.

        Args:
            tokens: ids.
            skip_special_tokens: leave out special tokens, such as the one that ends a turn.
        """
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        for found, shown in _CLEAN_UP if self._cleans_up else ():
            text = text.replace(found, shown)
        return text

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for, also where they are part of a character; none if it is unknown."""
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if not self._is_byte_level and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text):
            return bytes([int(text[3:5], 16)])
        if token in self._added:
            return str(self._added[token].content).encode()
        if self._is_byte_level:
            table = _byte_alphabet()
            return b"".join(table.get(c, c.encode()) for c in text)
        return str(text).replace("\u2581", " ").encode()

    def get_chat_template(self, chat_template: None = None, tools: Sequence[Any] | None = None) -> Any:
        """Return the chat template's source, with `tools` the one for functions where there is one.

        Raises:
            ValueError: there are several, none of them the default.
        """
        if not isinstance(self.chat_template, dict):
            return self.chat_template
        for name in (*(["tool_use"] if tools is not None else []), "default"):
            if name in self.chat_template:
                return self.chat_template[name]
        raise ValueError(f"it has multiple chat templates and no default: {', '.join(sorted(self.chat_template))}")


def open_tokenizer(directory: str | Path) -> Any:
    """Return the tokenizer in a bundle's folder: by tokenizers alone, by transformers where there is no tokenizer.json.

    Raises:
        ExtraError: transformers is needed and missing.
        CheckpointError: a file is missing or damaged.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").exists() or not any(directory.glob("*")):
        return BundleTokenizer(directory)
    require(f"{directory}, which has no tokenizer.json,", "train")
    return load_tokenizer(directory)


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the bytes that a token stands for; of transformers' tokenizers, those of its decoded text."""
    if isinstance(tokenizer, BundleTokenizer):
        return tokenizer.token_bytes(token)
    return str(tokenizer.decode([token])).encode()


def _has_byte_level(decoder: Any) -> bool:
    """Return whether a decoder of tokenizer.json maps characters to bytes."""
    if not isinstance(decoder, dict):
        return False
    return decoder.get("type") == "ByteLevel" or any(map(_has_byte_level, decoder.get("decoders", ())))


@functools.cache
def _byte_alphabet() -> dict[str, bytes]:
    """Return GPT-2's character for each byte: printable ones are themselves, the others follow from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    table = {chr(byte): bytes([byte]) for byte in own}
    return table | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)}


def check_same(tokenizer: Any, directory: Path) -> None:
    """Refuse a tokenizer whose saved files give other tokens, texts or templates without transformers.

    A class of transformers may add to what tokenizer.json says.

    Args:
        tokenizer: as transformers reads it, and has trained with.
        directory: where it was saved.

    Raises:
        CheckpointError: it does.
    """
    if not (directory / "tokenizer.json").exists():  # `open_tokenizer` asks for transformers
        return
    other = BundleTokenizer(directory)
    added = sorted(map(str, tokenizer.get_added_vocab()))
    for text in (*_PROBES, "a".join(added), f" {' '.join(added)} ", *(f"x {token}\n{token}y" for token in added[:64])):
        for special in (True, False):
            (ids,) = tokenizer([text], add_special_tokens=special, verbose=False)["input_ids"]
            (found,) = other([text], add_special_tokens=special)["input_ids"]
            texts = [[t.decode(ids, skip_special_tokens=skip) for skip in (True, False)] for t in (tokenizer, other)]
            if list(ids) != found or texts[0] != texts[1]:
                raise _differs(tokenizer, f"for {text[:60]!r}")
    if (tokenizer.chat_template or None) != (other.chat_template or None):
        raise _differs(tokenizer, "in its chat template")
    if dict(tokenizer.special_tokens_map) != other.special_tokens_map:
        raise _differs(tokenizer, "in its special tokens")


def _differs(tokenizer: Any, where: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer of {tokenizer.name_or_path} ({type(tokenizer).__name__}) differs {where} without transformers, "
        "which a bundle does without; save it as a PreTrainedTokenizerFast beside the model"
    )


def _has_settings(directory: Path) -> bool:
    return (directory / "tokenizer_config.json").exists()


def _cleans_up(settings: dict[str, Any], model: str) -> bool:
    """Return whether decoded texts lose spaces before punctuation; of BPE only where the settings insist on it."""
    insisted = settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    return bool(settings.get("clean_up_tokenization_spaces")) and (model != "BPE" or bool(insisted))


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Return name → text of the named special tokens, which chat templates may use."""
    found = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _templates(directory: Path, settings: dict[str, Any]) -> Any:
    """Return the chat template, or name → template where there are several, as transformers finds them."""
    default = directory / "chat_template.jinja"
    files = {"default": read_text(default)} if default.exists() else {}
    files |= {path.stem: read_text(path) for path in extra_templates(directory)}
    if files:
        return files["default"] if list(files) == ["default"] else files
    named = settings.get("chat_template")
    if isinstance(named, list):
        return {str(entry.get("name")): entry.get("template") for entry in named if isinstance(entry, dict)}
    return named
