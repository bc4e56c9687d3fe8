"""The tokenizers of onnxruntime-extensions and onnxruntime-genai through their C interfaces, one process for each job.

python benchmarks/tokenizer_libraries.py extensions|genai LIBRARY TOKENIZER TEXTS.json ROUNDS

Prints {"load_s", "ids", "decoded", "seconds" of each round over all texts} as JSON; a refusal is one line on standard
error and exit code 2. TOKENIZER is a directory with tokenizer.json and tokenizer_config.json.
"""

import ctypes
import json
import sys
import time
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Protocol

__all__ = ["Library", "measure"]


class Library(Protocol):
    """Text to ids and back."""

    def encode(self, text: bytes, copy: bool = True) -> list[int]:
        """Return the ids of UTF-8 text, none without `copy`; a C string ends at its first NUL."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        ...


class Extensions:
    """Onnxruntime-extensions' ortx_tokenizer.h."""

    def __init__(self, library: str, tokenizer: str) -> None:
        self._c = ctypes.CDLL(library)
        self._c.OrtxGetLastErrorMessage.restype = c_char_p
        self._tokenizer = c_void_p()
        self._check(self._c.OrtxCreateTokenizer(byref(self._tokenizer), tokenizer.encode()))

    def _check(self, code: int) -> None:
        if code:
            raise ValueError(f"{code}: {(self._c.OrtxGetLastErrorMessage() or b'').decode(errors='replace')}")

    def encode(self, text: bytes, copy: bool = True) -> list[int]:
        """Return the ids of UTF-8 text."""
        found, ids, count = c_void_p(), POINTER(c_uint32)(), c_size_t()
        self._check(self._c.OrtxTokenize(self._tokenizer, (c_char_p * 1)(text), c_size_t(1), byref(found)))
        self._check(self._c.OrtxTokenId2DArrayGetItem(found, c_size_t(0), byref(ids), byref(count)))
        result = ids[: count.value] if copy else []
        self._c.OrtxDispose(byref(found))
        return result

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        found, text, array = c_void_p(), c_char_p(), (c_uint32 * len(ids))(*ids)
        self._check(self._c.OrtxDetokenize1D(self._tokenizer, array, c_size_t(len(ids)), byref(found)))
        self._check(self._c.OrtxStringArrayGetItem(found, c_size_t(0), byref(text)))
        result = (text.value or b"").decode(errors="replace")
        self._c.OrtxDispose(byref(found))
        return result


class GenAI:
    """Onnxruntime-genai's ort_genai_c.h; it opens libonnxruntime.so by the loader's path."""

    def __init__(self, library: str, tokenizer: str) -> None:
        self._c = ctypes.CDLL(library)
        for name in (
            "OgaCreateTokenizerFromPath",
            "OgaUpdateTokenizerOptions",
            "OgaCreateSequences",
            "OgaTokenizerEncode",
            "OgaTokenizerDecode",
        ):
            getattr(self._c, name).restype = c_void_p
        self._c.OgaResultGetError.restype = c_char_p
        self._c.OgaSequencesGetSequenceCount.restype = c_size_t
        self._c.OgaSequencesGetSequenceData.restype = POINTER(c_int32)
        self._tokenizer = c_void_p()
        self._check(self._c.OgaCreateTokenizerFromPath(tokenizer.encode(), byref(self._tokenizer)))
        key, value = (c_char_p * 1)(b"add_special_tokens"), (c_char_p * 1)(b"true")
        self._check(self._c.OgaUpdateTokenizerOptions(self._tokenizer, key, value, c_size_t(1)))

    def _check(self, result: int | None) -> None:
        if result:
            raise ValueError(self._c.OgaResultGetError(c_void_p(result)).decode(errors="replace"))

    def encode(self, text: bytes, copy: bool = True) -> list[int]:
        """Return the ids of UTF-8 text."""
        found = c_void_p()
        self._check(self._c.OgaCreateSequences(byref(found)))
        self._check(self._c.OgaTokenizerEncode(self._tokenizer, text, found))
        count = self._c.OgaSequencesGetSequenceCount(found, c_size_t(0))
        result = self._c.OgaSequencesGetSequenceData(found, c_size_t(0))[: count if copy else 0]
        self._c.OgaDestroySequences(found)
        return list(result)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        text, array = c_char_p(), (c_int32 * len(ids))(*ids)
        self._check(self._c.OgaTokenizerDecode(self._tokenizer, array, c_size_t(len(ids)), byref(text)))
        result = (text.value or b"").decode(errors="replace")
        self._c.OgaDestroyString(text)
        return result


_KINDS: dict[str, Callable[[str, str], Library]] = {"extensions": Extensions, "genai": GenAI}


def measure(kind: str, library: str, tokenizer: str, texts: list[str], rounds: int) -> dict[str, object]:
    """Return what a library makes of texts, and its times."""
    start = time.perf_counter()
    opened = _KINDS[kind](library, tokenizer)
    load, given = time.perf_counter() - start, [text.encode() for text in texts]
    ids = [opened.encode(text) for text in given]
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for text in given:
            opened.encode(text, copy=False)
        seconds.append(time.perf_counter() - start)
    # Extensions crashes on no tokens: only an empty text asks for that, not one that ends at a NUL in front.
    decoded = [opened.decode(row) if row or not text else "" for row, text in zip(ids, texts, strict=True)]
    return {"load_s": load, "ids": ids, "decoded": decoded, "seconds": seconds}


if __name__ == "__main__":
    name, path, folder, written, turns = sys.argv[1:]
    try:
        answer = measure(name, path, folder, json.loads(Path(written).read_text()), int(turns))
    except ValueError as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(2)
    print(json.dumps(answer))
