"""coatrt's backend "cuda": logits against torch, times of `decode`, LoRA switches, refusals."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from backend_models import MAPS, PARITY_FORMATS, Parity, RandomModel, driver_memory, loaded, refused, torch_free
from decoder import MODELS
from rows import Rows, arguments, run

PROMPT, STEPS = 512, 100
FIRST = ("int4-g64", "nvfp4", "fp16", "int8", "nf3-g64-dq4-bf16-256")  # the formats whose parity comes first


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return p50 and p99 in ms."""
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
    return {"p50_ms": round(float(p50), 4), "p99_ms": round(float(p99), 4)}


def seconds_of(work: Callable[[], Any], repeats: int) -> list[float]:
    """Return the seconds of each of some calls after a warm-up call."""
    work()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return found


def speed(directory: Path, model: RandomModel, dry: bool) -> dict[str, Any]:
    """Load a graph and time prefill, decode steps with and without graph replay, and LoRA switches."""
    prompt, steps = (8, 4) if dry else (PROMPT, STEPS)
    before = driver_memory(dry)
    started = time.perf_counter()
    decoder = loaded(directory, model, dry)
    found: dict[str, Any] = {"load_s": round(time.perf_counter() - started, 3), "weights_gb": model.weight_gb}
    rng = np.random.default_rng(0)
    lora = model.random_lora(rng)
    if lora is not None:
        packed = decoder.packed(lora)
        decoder.set_lora(packed)
        found["lora_mb"] = round(packed.buffer.nbytes / 1e6, 2)
    tokens = rng.integers(0, decoder.io.vocabulary, prompt + 4 * steps + 8).tolist()
    found["prefill_ms"] = percentiles(seconds_of(lambda: decoder.prefill([tokens[:prompt]]), 2 if dry else 5))
    follow = iter(tokens[prompt:])
    started = time.perf_counter()
    first = decoder.decode([next(follow)])
    found["first_step_ms"] = round(1e3 * (time.perf_counter() - started), 2)  # with the capture
    found["finite"] = bool(np.isfinite(first).all())
    found["decode_ms"] = percentiles(seconds_of(lambda: decoder.decode([next(follow)]), steps))
    found["tokens_per_s"] = round(1e3 / found["decode_ms"]["p50_ms"], 1)
    found["memory_gb"] = round((before - driver_memory(dry)) / 1e9, 3)
    decoder._replays = False
    found["decode_no_graph_ms"] = percentiles(seconds_of(lambda: decoder.decode([next(follow)]), steps // 4))
    if lora is not None:
        repeats = 2 if dry else 10
        found["switch_packed_ms"] = percentiles(seconds_of(lambda: decoder.set_lora(packed), repeats))
        found["switch_off_ms"] = percentiles(seconds_of(lambda: decoder.set_lora(None), repeats))
        found["switch_cast_ms"] = percentiles(seconds_of(lambda: decoder.set_lora(lora), 2))
        found["pack_ms"] = percentiles(seconds_of(lambda: decoder.packed(lora), 2))
    return found


def speed_rows(rows: Rows, name: str, text: str, lora: bool) -> None:
    """Write a random model's graph and time it."""
    key = f"backend/speed/{name}/{text}/{'lora' if lora else 'base'}"
    if rows.has(key):
        return

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            started = time.perf_counter()
            model = RandomModel(MODELS[name], MAPS[text], lora)
            model.write(Path(scratch))
            wrote = round(time.perf_counter() - started, 2)
            return {"write_s": wrote, **speed(Path(scratch), model, rows.dry)}

    rows.measure(key, work)


def main() -> None:
    """Measure."""
    rows, _ = arguments(__doc__.splitlines()[0])
    dry = rows.dry
    scratch = Path(tempfile.mkdtemp())
    try:
        parity = Parity(scratch, dry)
        for text in FIRST:
            rows.measure(f"backend/parity/{text}", lambda text=text: parity.check(text))
        rows.measure("backend/without torch", lambda: torch_free(scratch, dry))
        rows.measure("backend/refused", lambda: refused(dry))
        names = ("tiny",) if dry else ("135m", "1b")
        for name in names:
            for text, lora in (("int4-g64", True), ("int4-g64", False), ("mixed", True)):
                speed_rows(rows, name, text, lora)
        if not dry:
            speed_rows(rows, "7b", "int4-g64", True)
        for text in PARITY_FORMATS:
            rows.measure(f"backend/parity/{text}", lambda text=text: parity.check(text))
        if not dry:
            rows.measure("backend/no room", lambda: parity.no_room())
            speed_rows(rows, "1b", "mixed with nvfp4", True)
            speed_rows(rows, "7b", "mixed", True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    run(main)
