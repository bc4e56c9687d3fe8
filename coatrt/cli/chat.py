"""`coatrt chat`."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coatrt.cli.common import PATH, SAMPLING, lora_options, runtime_options, sampling_options, trust_options
from coatrt.cli.help import documented

if TYPE_CHECKING:
    from coatrt.bundle import SignaturePolicy
    from coatrt.engines.runtime.chat import Chat

__all__ = ["command"]

_HELP = """\
/help           this text
/reset          forget the conversation
/system [TEXT]  set the system message and forget the conversation; without TEXT: none
/undo           forget the last message and its reply
/quit           end; so does Ctrl-D
Ctrl-C stops a reply. A line that begins with // is a message that begins with /."""


@documented(
    examples=(
        "coatrt chat bundles/l4",
        'coatrt chat bundles/l4 --system "Answer briefly." --temperature 0.7',
        'printf "Is ice cold?\\nAnd steam?\\n" | coatrt chat bundles/l4',
    ),
    first=(
        *("system", "max_tokens", "stop", "temperature", "top_k", "top_p", "seed", "backend", "context", "threads"),
    ),
)
@click.argument("bundle", type=PATH)
@click.option("--system", default="", help="System message.")
@click.option("-n", "--max-tokens", type=int, help="Most tokens of a reply.  [default: what the context leaves]")
@sampling_options
@lora_options
@trust_options
@runtime_options("backend", "context", "threads", "accuracy_level")
def command(
    bundle: Path,
    system: str,
    max_tokens: int | None,
    stop: tuple[str, ...],
    lora: Path | None,
    strict_lora: bool,
    no_lora: bool,
    key: Path | None,
    signature: "SignaturePolicy | None",
    **options: Any,
) -> None:
    """Talk with a bundle in the terminal.

    BUNDLE is a directory that coatrt build or export wrote. Each line is a message; /help lists commands. The
    conversation stays in the KV cache: a turn computes only what is new.
    """
    from coatrt.bundle import Bundle
    from coatrt.cli.prompts import check_stops
    from coatrt.data.chat_template import chat_template
    from coatrt.engines.runtime.chat import Chat
    from coatrt.engines.runtime.decoder import CachedDecoder
    from coatrt.engines.runtime.load import check_decoder, load_decoder
    from coatrt.engines.runtime.lora_file import load_lora
    from coatrt.engines.runtime.options import RuntimeOptions
    from coatrt.engines.runtime.sampling import Sampling
    from coatrt.errors import CoatError, ConfigError

    sampling = Sampling(**{name: options.pop(name) for name in SAMPLING})
    check_stops(stop)
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
    opened = Bundle.open(bundle, key=key, policy=signature)
    check_decoder(opened, options["backend"])
    tokenizer = opened.tokenizer()
    if chat_template(tokenizer) is None:
        raise ConfigError("the model's tokenizer has no chat template; use coatrt run")
    decoder = load_decoder(opened, RuntimeOptions(strict_lora=strict_lora, **options))
    assert isinstance(decoder, CachedDecoder)
    if not no_lora:
        decoder.set_lora(load_lora(lora or opened.path(opened.manifest["lora"]), opened.contract))
    chat = Chat(decoder, tokenizer, opened.manifest["model"]["stop_tokens"], system=system)
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and history in `input`
        click.echo("/help lists commands, Ctrl-C stops a reply, Ctrl-D ends.", err=True)
    for line in _lines(interactive):
        message = line.strip()
        if message.startswith("/") and not message.startswith("//"):
            if message == "/quit":
                return
            _obey(chat, message)
        elif message:
            try:
                pieces = chat.reply(
                    message.removeprefix("/") if message.startswith("//") else message,
                    max_tokens=max_tokens,
                    sampling=sampling,
                    stop=stop,
                )
                _show(chat, pieces)
            except CoatError as error:
                if not interactive:
                    raise
                click.echo(f"coatrt: {error}", err=True)


def _lines(interactive: bool) -> Iterator[str]:
    """Yield the lines of standard input, with a prompt in a terminal."""
    while True:
        try:
            yield input("> ") if interactive else input()
        except EOFError:
            if interactive:
                click.echo()
            return
        except UnicodeDecodeError:
            click.echo("coatrt: the line is not UTF-8; type it again", err=True)


def _obey(chat: "Chat", line: str) -> None:
    name, _, rest = line.partition(" ")
    if name == "/help":
        click.echo(_HELP, err=True)
    elif name == "/reset":
        chat.reset()
    elif name == "/system":
        chat.reset()
        chat.system = rest.strip()
    elif name == "/undo":
        if not chat.undo():
            click.echo("coatrt: nothing to forget", err=True)
    else:
        click.echo(f"coatrt: unknown command {name}; /help lists them", err=True)


def _show(chat: "Chat", pieces: Iterator[str]) -> None:
    """Print a reply as it comes, until Ctrl-C, and then its speed."""
    began, first = time.perf_counter(), 0.0
    with _interrupts() as interrupted:
        for piece in pieces:
            first = first or time.perf_counter()
            click.echo(piece, nl=False)
            if interrupted():
                pieces.close()  # type: ignore[attr-defined]
                break
    seconds = time.perf_counter() - first
    click.echo()
    rate = f", {(chat.tokens - 1) / seconds:.1f} tokens/s" if chat.tokens > 1 and seconds > 0 else ""
    note = f", {chat.reason}" if chat.reason != "stop" else ""
    wait = f", first after {first - began:.2f} s" if first else ""
    click.echo(f"{chat.tokens} token{'s' * (chat.tokens != 1)}{rate}{wait}{note}", err=True)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C instead of ending; yields a function that says whether it came."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)
