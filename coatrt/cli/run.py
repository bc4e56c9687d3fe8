"""`coatrt run`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coatrt.cli.common import PATH, runtime_options, trust_options
from coatrt.cli.help import documented

if TYPE_CHECKING:
    from coatrt.bundle import SignaturePolicy

__all__ = ["command"]


@documented(
    examples=(
        'coatrt run bundles/l4 -p "Once upon a time" -n 128',
        'coatrt run bundles/l4 -p "Is ice cold?" --chat --system "Answer briefly."',
        "coatrt run bundles/l4 -f prompt.txt --temperature 0.8 --top-p 0.95",
        'echo "Once upon a time" | coatrt run bundles/l4 -p -',
    ),
    first=(
        *("prompts", "files", "max_tokens", "chat", "system", "temperature", "top_k", "top_p", "seed"),
        *("backend", "context", "threads"),
    ),
)
@click.argument("bundle", type=PATH)
@click.option("-p", "--prompt", "prompts", multiple=True, help="Prompt; - reads standard input. Repeat it for a batch.")
@click.option("-f", "--file", "files", multiple=True, metavar="FILE", help="Prompt from a UTF-8 file; repeatable.")
@click.option("-n", "--max-tokens", type=int, default=64, help="Most tokens to generate.")
@click.option("--temperature", "--temp", type=float, default=0.0, help="0 takes the likeliest token.")
@click.option("--top-k", type=int, default=0, help="Sample among the k likeliest tokens; 0: among all.")
@click.option("--top-p", type=float, default=1.0, help="Sample among the likeliest tokens of this total probability.")
@click.option("--seed", type=int, default=0, help="Seed of the sampling.")
@click.option("--chat", is_flag=True, help="Apply the model's chat template.")
@click.option("--system", help="System message of a chat.")
@click.option("--lora", type=PATH, help="Use another LoRA file (see coatrt adapt) with the same weights.")
@click.option("--strict-lora", is_flag=True, help="Refuse a LoRA made for another configuration.")
@click.option("--no-lora", is_flag=True, help="Run the quantized weights without a LoRA.")
@trust_options
@runtime_options("backend", "context", "threads", "accuracy_level")
def command(
    bundle: Path,
    prompts: tuple[str, ...],
    files: tuple[str, ...],
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    chat: bool,
    system: str | None,
    lora: Path | None,
    strict_lora: bool,
    no_lora: bool,
    key: Path | None,
    signature: "SignaturePolicy | None",
    **runtime: Any,
) -> None:
    """Generate text with a bundle.

    BUNDLE is a directory that coatrt build or export wrote.
    """
    from coatrt.bundle import Bundle
    from coatrt.cli.prompts import read_prompts
    from coatrt.engines.runtime.generate import encode_prompt, generate
    from coatrt.engines.runtime.load import check_decoder, load_decoder
    from coatrt.engines.runtime.lora_file import load_lora
    from coatrt.engines.runtime.options import RuntimeOptions
    from coatrt.engines.runtime.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    texts = read_prompts(prompts, files)
    opened = Bundle.open(bundle, key=key, policy=signature)
    check_decoder(opened, runtime["backend"])
    tokenizer = opened.tokenizer()
    ids = [encode_prompt(tokenizer, prompt, chat=chat, system=system) for prompt in texts]
    decoder = load_decoder(opened, RuntimeOptions(batch=len(ids), strict_lora=strict_lora, **runtime))
    if not no_lora:
        path = lora if lora is not None else opened.path(opened.manifest["lora"])
        decoder.set_lora(load_lora(path, opened.contract))
    tokens: list[int] = []
    shown = ""

    def stream(_: int, token: int) -> None:
        nonlocal shown
        tokens.append(token)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # part of a character: wait for its other bytes
            click.echo(text[len(shown) :], nl=False)
            shown = text

    stop = opened.manifest["model"]["stop_tokens"]
    results = generate(
        decoder, ids, max_tokens=max_tokens, sampling=sampling, stop=stop, on_token=stream if len(ids) == 1 else None
    )
    if len(ids) == 1:
        click.echo()
        return
    for prompt, result in zip(texts, results, strict=True):
        click.echo(f"[{prompt}]\n{tokenizer.decode(list(result.tokens), skip_special_tokens=True)}\n")
