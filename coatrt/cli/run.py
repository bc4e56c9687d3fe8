"""`coatrt run`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coatrt.cli.common import PATH, runtime_options, trust_options

if TYPE_CHECKING:
    from coatrt.bundle import SignaturePolicy

__all__ = ["command"]


@click.command()
@click.argument("bundle", type=PATH)
@click.option("-p", "--prompt", "prompts", multiple=True, required=True, help="Prompt; repeat it for a batch.")
@click.option("--max-tokens", type=int, default=64, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=int, default=0, show_default=True, help="0 for all.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--chat", is_flag=True, help="Apply the model's chat template.")
@click.option("--system", help="System message of a chat.")
@click.option("--lora", type=PATH, help="Another LoRA file (coatrt adapt) on the same weights.")
@click.option("--strict-lora", is_flag=True, help="Refuse a LoRA of another configuration than the weights'.")
@click.option("--no-lora", is_flag=True, help="The quantized base alone.")
@trust_options
@runtime_options("backend", "context", "threads", "accuracy_level")
def command(
    bundle: Path,
    prompts: tuple[str, ...],
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
    """Generate text from BUNDLE."""
    from coatrt.bundle import Bundle
    from coatrt.engines.runtime.generate import Sampling, encode_prompt, generate
    from coatrt.engines.runtime.load import check_decoder, load_decoder
    from coatrt.engines.runtime.lora_file import load_lora
    from coatrt.engines.runtime.options import RuntimeOptions

    sampling = Sampling(temperature, top_k, top_p, seed)
    opened = Bundle.open(bundle, key=key, policy=signature)
    check_decoder(opened, runtime["backend"])
    tokenizer = opened.tokenizer()
    ids = [encode_prompt(tokenizer, prompt, chat=chat, system=system) for prompt in prompts]
    decoder = load_decoder(opened, RuntimeOptions(batch=len(ids), strict_lora=strict_lora, **runtime))
    if not no_lora:
        path = lora if lora is not None else opened.path(opened.manifest["lora"])
        decoder.set_lora(load_lora(path, opened.contract))
    made: list[int] = []
    shown = ""

    def stream(_: int, token: int) -> None:
        nonlocal shown
        made.append(token)
        text = tokenizer.decode(made, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # half a character: wait for its other bytes
            click.echo(text[len(shown) :], nl=False)
            shown = text

    stop = opened.manifest["model"]["stop_tokens"]
    results = generate(
        decoder, ids, max_tokens=max_tokens, sampling=sampling, stop=stop, on_token=stream if len(ids) == 1 else None
    )
    if len(ids) == 1:
        click.echo()
        return
    for prompt, result in zip(prompts, results, strict=True):
        click.echo(f"[{prompt}]\n{tokenizer.decode(list(result.tokens), skip_special_tokens=True)}\n")
