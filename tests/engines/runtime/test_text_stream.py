"""Text as tokens come: complete characters, nothing of a stop string, in sum what the tokenizer decodes."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from coatrt.engines.runtime.text_stream import TextStream

END = 256


class ByteTokenizer:
    """One token a byte; 256 is special."""

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return bytes(token for token in tokens if token < END).decode(errors="replace")


class WordTokenizer:
    """Words with a space before each, which is removed at the start of a text, as SentencePiece's decoders do."""

    words = ("\u2581", "\u2581the", "\u2581cat", "s", "\u2581", "\u2581\u2581")

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        text = "".join(self.words[token] for token in tokens if token < len(self.words)).replace("\u2581", " ")
        return text.removeprefix(" ")


def streamed(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    """Return the pieces of each token, and the last one."""
    return [*map(stream.push, tokens), stream.close()]


def before_stop(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first stop string that is complete, found by trying every end."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(st.lists(st.one_of(st.integers(0, 256), st.sampled_from([*"é日🙂ab".encode(), END])), max_size=40))
def test_the_pieces_add_up_to_the_text(tokens: list[int]) -> None:
    pieces = streamed(TextStream(ByteTokenizer()), tokens)
    assert "".join(pieces) == ByteTokenizer().decode(tokens, True)
    shown = ""
    for i, piece in enumerate(pieces[:-1]):
        shown += piece
        assert ByteTokenizer().decode(tokens[: i + 1], True).startswith(shown)


@given(st.lists(st.integers(0, 6), max_size=30))
def test_spaces_between_words_stay(tokens: list[int]) -> None:
    assert "".join(streamed(TextStream(WordTokenizer()), tokens)) == WordTokenizer().decode(tokens, True)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4))
def test_stop_strings_in_any_position(text: str, stops: list[str]) -> None:
    stream = TextStream(ByteTokenizer(), stops)
    pieces = streamed(stream, text.encode())
    expected = before_stop(text, stops)
    assert "".join(pieces) == expected
    assert stream.stopped == any(stop in text for stop in stops)
    shown = ""
    for i, piece in enumerate(pieces[:-1]):  # as much is shown as cannot begin a stop string
        shown += piece
        held = text[len(shown) : i + 1]
        if len(shown) < len(expected) or not stream.stopped:
            assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_within_one_piece_of_several_characters() -> None:
    class Pieces:
        def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
            return "".join("one two three " for _ in tokens)

    stream = TextStream(Pieces(), ["three", "two t"])
    assert stream.push(0) == "one " and stream.stopped
    assert stream.push(0) == stream.close() == ""


def test_what_is_held_back_comes_at_the_end() -> None:
    stream = TextStream(ByteTokenizer(), ["ab!"])
    assert [stream.push(token) for token in b"xab"] == ["x", "", ""]
    assert stream.close() == "ab" and not stream.stopped
