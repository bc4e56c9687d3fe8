"""A conversation: each reply is that of the whole conversation, of which only the new part is computed."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coatrt.bundle import Bundle
from coatrt.cli.main import cli
from coatrt.engines.runtime.chat import Chat
from coatrt.engines.runtime.generate import encode_chat, generate
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.errors import ConfigError


@pytest.fixture(scope="module")
def parts(tiny_bundle: Path) -> tuple[Bundle, Any, Any]:
    bundle = Bundle.open(tiny_bundle)
    decoder = load_decoder(bundle, context=400, accuracy_level=0)
    decoder.set_lora(load_lora(bundle.path(bundle.manifest["lora"]), bundle.contract))
    return bundle, decoder, bundle.tokenizer()


def anew(parts: tuple[Bundle, Any, Any], messages: list[dict[str, str]]) -> str:
    """Return the reply to a conversation that is computed from its first token."""
    bundle, decoder, tokenizer = parts
    ids = encode_chat(tokenizer, messages)
    (result,) = generate(decoder, [ids], max_tokens=10, stop=bundle.manifest["model"]["stop_tokens"])
    return str(tokenizer.decode(list(result.tokens), skip_special_tokens=True))


def test_turns_are_those_of_the_whole_conversation(parts: tuple[Bundle, Any, Any]) -> None:
    bundle, decoder, tokenizer = parts
    chat = Chat(decoder, tokenizer, bundle.manifest["model"]["stop_tokens"], system="be brief")
    replies, reused = [], []
    for message in ("the cat", "the dog sat", "where?"):
        replies.append("".join(chat.reply(message, max_tokens=10)))
        reused.append(chat.reused)
        assert chat.tokens == 10 and chat.reason == "length"
    assert reused[0] == 0 and reused[2] > reused[1] > len(encode_chat(tokenizer, chat.messages[:1]))
    messages = [{"role": "system", "content": "be brief"}]
    for turn in range(3):
        messages.append(chat.messages[2 * turn])
        assert anew(parts, messages) == replies[turn] == chat.messages[2 * turn + 1]["content"]
        messages.append(chat.messages[2 * turn + 1])


def test_a_reply_that_is_cut_off_stays_in_the_conversation(parts: tuple[Bundle, Any, Any]) -> None:
    _, decoder, tokenizer = parts
    chat = Chat(decoder, tokenizer)
    pieces = chat.reply("the cat")
    part = next(pieces) + next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert chat.reason == "cancelled" and chat.tokens == 2
    assert chat.messages == [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": part}]
    assert chat.undo() and chat.messages == [] and not chat.undo()


def test_stop_strings_and_the_context(parts: tuple[Bundle, Any, Any]) -> None:
    _, decoder, tokenizer = parts
    chat = Chat(decoder, tokenizer)
    whole = "".join(chat.reply("the cat"))
    assert chat.reason == "length" and chat.tokens == 400 - len(encode_chat(tokenizer, chat.messages[:1]))
    with pytest.raises(ConfigError, match=r"the context 400: forget it with /reset"):
        chat.reply("again")
    chat.reset()
    assert "".join(chat.reply("the cat", stop=[whole[4:7]])) == whole[: whole.index(whole[4:7])]
    assert chat.reason == "stop"


def test_a_batch_is_refused(parts: tuple[Bundle, Any, Any]) -> None:
    bundle, _, tokenizer = parts
    with pytest.raises(ConfigError, match="batch 1, got 2"):
        Chat(load_decoder(bundle, context=64, batch=2), tokenizer)  # type: ignore[arg-type]


def test_the_command_reads_messages_from_a_pipe(tiny_bundle: Path, parts: tuple[Bundle, Any, Any]) -> None:
    bundle, decoder, tokenizer = parts
    chat = Chat(decoder, tokenizer, bundle.manifest["model"]["stop_tokens"], system="be brief")
    first, second = ("".join(chat.reply(text, max_tokens=9)) for text in ("the cat", "/why"))
    chat.reset()
    third = "".join(chat.reply("the cat", max_tokens=9))
    chat.system = ""
    chat.reset()
    fourth = "".join(chat.reply("the cat", max_tokens=9))
    words = ["chat", str(tiny_bundle), "--system", "be brief", "-n", "9", "--accuracy-level", "0", "--context", "400"]
    lines = [
        "the cat",
        "//why",
        "/undo",
        "/reset",
        "the cat",
        "",
        "/nothing",
        "/system",
        "the cat",
        "/help",
        "/quit",
        "x",
    ]
    done = CliRunner().invoke(cli, words, input="\n".join(lines), catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stdout == f"{first}\n{second}\n{third}\n{fourth}\n"
    assert "unknown command /nothing" in done.stderr and "forget the conversation" in done.stderr


def test_ctrl_c_stops_a_reply_and_not_the_chat(tiny_bundle: Path) -> None:
    """In a terminal: a reply without an end, Ctrl-C, and the next prompt."""
    command = [sys.executable, "-m", "coatrt", "chat", str(tiny_bundle), "--context", "8000", "--threads", "1"]
    master, slave = pty.openpty()
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    shown = b""

    def wait_for(text: bytes) -> None:
        nonlocal shown
        end = time.monotonic() + 60
        while text not in shown:
            assert time.monotonic() < end, shown[-500:]
            if select.select([master], [], [], 1)[0]:
                shown += os.read(master, 1 << 16)

    try:
        wait_for(b"> ")
        os.write(master, b"the cat\n")
        wait_for(b"the the")
        process.send_signal(signal.SIGINT)
        wait_for(b", cancelled")
        shown = b""
        os.write(master, b"/quit\n")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
