"""`coatrt run`: standard input, stop strings, JSON, tokens/s."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from coatrt.bundle import Bundle
from coatrt.cli.main import cli
from coatrt.engines.runtime.generate import encode_prompt, generate
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.engines.runtime.sampling import Sampling

PROMPT = "the cat sat"


@pytest.fixture(scope="module")
def parts(tiny_bundle: Path) -> tuple[Bundle, Any, Any]:
    bundle = Bundle.open(tiny_bundle)
    decoder = load_decoder(bundle, context=96)
    decoder.set_lora(load_lora(bundle.path(bundle.manifest["lora"]), bundle.contract))
    return bundle, decoder, bundle.tokenizer()


def expected(parts: tuple[Bundle, Any, Any], count: int, sampling: Sampling | None = None) -> tuple[list[int], str]:
    bundle, decoder, tokenizer = parts
    ids = encode_prompt(tokenizer, PROMPT)
    ends = bundle.manifest["model"]["stop_tokens"]
    (result,) = generate(decoder, [ids], max_tokens=count, sampling=sampling, stop=ends)
    return list(result.tokens), tokenizer.decode(list(result.tokens), skip_special_tokens=True)


def run(bundle: Path, *arguments: object, text: str = "") -> Result:
    words = ["run", str(bundle), "--context", "96", *map(str, arguments)]
    done = CliRunner().invoke(cli, words, input=text)
    assert done.exit_code == 0, done.output
    return done


def test_standard_input_is_the_prompt(tiny_bundle: Path, parts: tuple[Bundle, Any, Any]) -> None:
    done = run(tiny_bundle, "-n", 20, text=f"{PROMPT}\n")
    assert done.stdout == expected(parts, 20)[1] + "\n"
    assert re.fullmatch(r"20 tokens, [0-9.]+ tokens/s\n", done.stderr)


def test_a_stop_string_ends_the_text_before_it(tiny_bundle: Path, parts: tuple[Bundle, Any, Any]) -> None:
    text = expected(parts, 24)[1]
    stop = text[9:13]
    done = run(tiny_bundle, "-p", PROMPT, "-n", 24, "--stop", stop, "--stop", "never")
    assert done.stdout == text[: text.index(stop)] + "\n"


def test_json(tiny_bundle: Path, parts: tuple[Bundle, Any, Any]) -> None:
    tokens, text = expected(parts, 12)
    found = json.loads(run(tiny_bundle, "-p", PROMPT, "-p", PROMPT, "-n", 12, "--json").stdout)
    result = {"prompt": PROMPT, "text": text, "tokens": tokens, "finish_reason": "length", "prompt_tokens": len(PROMPT)}
    assert found["results"] == [result, result]
    assert found["prefill_seconds"] > 0 and found["tokens_per_second"] > 0
    stop = text[3:6]
    (cut,) = json.loads(run(tiny_bundle, "-p", PROMPT, "-n", 12, "--json", "--stop", stop).stdout)["results"]
    assert cut["text"] == text[: text.index(stop)] and cut["finish_reason"] == "stop"


def test_the_options_of_sampling_reach_it(tiny_bundle: Path, parts: tuple[Bundle, Any, Any]) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.9,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
        "seed": 11,
    }
    options = [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", value)]
    text = expected(parts, 30, Sampling(**fields))[1]
    assert text != expected(parts, 30)[1]
    assert run(tiny_bundle, "-p", PROMPT, "-n", 30, *options).stdout == f"{text}\n"


def test_an_empty_stop_string_is_refused(tiny_bundle: Path) -> None:
    done = CliRunner().invoke(cli, ["run", str(tiny_bundle), "-p", "x", "--stop", ""])
    assert "--stop must be a text of at least one character" in str(done.exception)
