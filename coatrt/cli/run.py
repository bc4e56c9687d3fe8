"""`coatrt run`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coatrt.cli.common import (
    JSON,
    PATH,
    SAMPLING,
    echo_json,
    lora_options,
    runtime_options,
    sampling_options,
    trust_options,
)
from coatrt.cli.help import documented

if TYPE_CHECKING:
    from coatrt.bundle import SignaturePolicy

__all__ = ["command"]


@documented(
    examples=(
        'coatrt run bundles/l4 -p "Once upon a time" -n 128',
        'coatrt run bundles/l4 -p "Is ice cold?" --chat --system "Answer briefly."',
        "coatrt run bundles/l4 -f prompt.txt --temperature 0.8 --stop END",
        'echo "Once upon a time" | coatrt run bundles/l4',
    ),
    first=(
        *("prompts", "files", "max_tokens", "stop", "chat", "system", "temperature", "top_k", "top_p", "seed"),
        *("backend", "context", "threads"),
    ),
)
@click.argument("bundle", type=PATH)
@click.option("-p", "--prompt", "prompts", multiple=True, help="Prompt; - reads standard input. Repeat it for a batch.")
@click.option("-f", "--file", "files", multiple=True, metavar="FILE", help="Prompt from a UTF-8 file; repeatable.")
@click.option("-n", "--max-tokens", type=int, default=64, help="Most tokens to generate.")
@click.option("--chat", is_flag=True, help="Apply the model's chat template.")
@click.option("--system", help="System message of a chat.")
@sampling_options
@lora_options
@JSON
@trust_options
@runtime_options("backend", "context", "threads", "accuracy_level")
def command(
    bundle: Path,
    prompts: tuple[str, ...],
    files: tuple[str, ...],
    max_tokens: int,
    chat: bool,
    system: str | None,
    stop: tuple[str, ...],
    lora: Path | None,
    strict_lora: bool,
    no_lora: bool,
    as_json: bool,
    key: Path | None,
    signature: "SignaturePolicy | None",
    **options: Any,
) -> None:
    """Generate text with a bundle.

    BUNDLE is a directory that coatrt build or export wrote. Without -p and -f, standard input is the prompt.
    """
    from coatrt.bundle import Bundle
    from coatrt.cli.prompts import check_stops, read_prompts
    from coatrt.engines.runtime.generate import encode_prompt, generate
    from coatrt.engines.runtime.load import check_decoder, load_decoder
    from coatrt.engines.runtime.lora_file import load_lora
    from coatrt.engines.runtime.options import RuntimeOptions
    from coatrt.engines.runtime.sampling import Sampling
    from coatrt.engines.runtime.text_stream import TextStream

    sampling = Sampling(**{name: options.pop(name) for name in SAMPLING})
    check_stops(stop)
    texts = read_prompts(prompts, files)
    opened = Bundle.open(bundle, key=key, policy=signature)
    check_decoder(opened, options["backend"])
    tokenizer = opened.tokenizer()
    ids = [encode_prompt(tokenizer, prompt, chat=chat, system=system) for prompt in texts]
    decoder = load_decoder(opened, RuntimeOptions(batch=len(ids), strict_lora=strict_lora, **options))
    if not no_lora:
        path = lora if lora is not None else opened.path(opened.manifest["lora"])
        decoder.set_lora(load_lora(path, opened.contract))
    streams = [TextStream(tokenizer, stop) for _ in ids]
    pieces: list[list[str]] = [[] for _ in ids]
    shows = len(ids) == 1 and not as_json
    times = [time.perf_counter()]

    def show(row: int, text: str) -> None:
        pieces[row].append(text)
        if shows:
            click.echo(text, nl=False)

    def take(row: int, token: int) -> bool:
        times.append(time.perf_counter())
        show(row, streams[row].push(token))
        return not streams[row].stopped

    ends = opened.manifest["model"]["stop_tokens"]
    results = generate(decoder, ids, max_tokens=max_tokens, sampling=sampling, stop=ends, on_token=take)
    times.append(time.perf_counter())
    for row, stream in enumerate(streams):
        show(row, stream.close())
    values = [
        {
            "prompt": prompt,
            "text": "".join(parts),
            "tokens": list(result.tokens),
            "finish_reason": "stop" if stream.stopped else result.reason,
            "prompt_tokens": len(row),
        }
        for prompt, parts, result, stream, row in zip(texts, pieces, results, streams, ids, strict=True)
    ]
    made, seconds = sum(len(result.tokens) for result in results), times[-1] - times[1]
    decoded = max(0, made - sum(bool(result.tokens) for result in results))
    rate = decoded / seconds if decoded and seconds > 0 else None
    if as_json:
        prefill = times[1] - times[0]
        echo_json({"results": values, "prefill_seconds": prefill, "tokens_per_second": rate})
        return
    if shows:
        click.echo()
    else:
        for value in values:
            click.echo(f"[{value['prompt']}]\n{value['text']}\n")
    shown = f", {rate:.1f} tokens/s" if rate is not None else ""
    click.echo(f"{made} token{'s' * (made != 1)}{shown}", err=True)
