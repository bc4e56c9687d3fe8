"""The same decode step in transformers under torch.compile (static cache, reduce-overhead), random float16 weights."""

import contextlib
import inspect
import time
from pathlib import Path
from typing import Any

import torch
from decoder import MODELS
from rows import arguments, run, summary
from runtime import event_times, stream
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

FILLED, STEPS, SLOTS = 512, 128, 2048


class Rival:
    """A compiled model with its static cache.

    Args:
        name: one of MODELS.
        dry: on the CPU, not compiled.
    """

    def __init__(self, name: str, dry: bool) -> None:
        shape, self.dry, self.device = MODELS[name], dry, "cpu" if dry else "cuda"
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=SLOTS,
            tie_word_embeddings=shape.tied,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.device(self.device):
            self.model: Any = LlamaForCausalLM(config).half().eval()
        self.cache: Any = StaticCache(config=config, max_cache_len=64 if dry else SLOTS)
        names = inspect.signature(self.model.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.counts = "cumulative_length" in inspect.getsource(type(self.cache.layers[0]))
        self.ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self.forward = self.model.forward
        if not dry:
            self.forward = torch.compile(self.model.forward, mode="reduce-overhead", fullgraph=True)

    def call(self, forward: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the logits [1, S, V]."""
        inputs = {"input_ids": ids, "position_ids": positions, self.cache_name: self.cache, "use_cache": True}
        if not self.counts:
            inputs["cache_position"] = positions[0]
        result: torch.Tensor = forward(**inputs, logits_to_keep=1).logits
        return result

    def fill(self, count: int) -> None:
        """Run a prompt, not compiled."""
        prompt = torch.randint(0, 200, (1, count), device=self.device)
        self.call(self.model.forward, prompt, torch.arange(count, device=self.device)[None])
        self.position.fill_(count)

    def step(self) -> None:
        """Run one token and take the most likely next one, on the device."""
        if not self.dry:
            torch.compiler.cudagraph_mark_step_begin()
        logits = self.call(self.forward, self.ids, self.position)
        torch.argmax(logits, dim=-1, out=self.ids)
        self.position.add_(1)


def compiled(name: str, dry: bool) -> tuple[Rival, float]:
    """Return a model after its first steps, and the seconds that took, compilation included."""
    began = time.perf_counter()
    rival = Rival(name, dry)
    rival.fill(8 if dry else FILLED)
    for _ in range(5):
        rival.step()
    if not dry:
        torch.cuda.synchronize()
    return rival, time.perf_counter() - began


def measured(rival: Rival, compile_s: float) -> dict[str, Any]:
    """Time greedy steps and whole prompts."""
    dry, filled, steps = rival.dry, *((8, 2) if rival.dry else (FILLED, STEPS))
    rival.position.fill_(filled)
    times = event_times(rival.step, steps, dry=dry)
    ordered = sorted(times)
    found: dict[str, Any] = {
        "greedy_ms": summary(times, 4),
        "greedy_p99_ms": round(ordered[int(0.99 * len(ordered))], 4),
        "tokens_per_s": round(1e3 * len(times) / sum(times), 1),
        "compile_s": round(compile_s, 1),
    }
    prompt = torch.randint(0, 200, (1, filled), device=rival.device)
    whole = event_times(lambda: rival.model(prompt, use_cache=False, logits_to_keep=1), 2 if dry else 8, dry=dry)
    found["prefill_eager_ms"] = summary(whole, 3)
    return found


@torch.no_grad()
def main() -> None:
    """Compile, wait for a quiet machine, measure."""
    rows, given = arguments(__doc__.splitlines()[0], hold="")
    with contextlib.nullcontext() if rows.dry else torch.cuda.stream(stream()):
        for name in ["tiny"] if rows.dry else ["135m", "1b"]:
            if rows.has(f"torch.compile/{name}/fp16"):
                continue
            found: list[tuple[Rival, float]] = []

            def compile_it(name: str = name, found: list[tuple[Rival, float]] = found) -> dict[str, Any]:
                found.append(compiled(name, rows.dry))
                return {"seconds": round(found[0][1], 1)}

            rows.measure(f"torch.compile/{name}/compiled", compile_it)
            while given.hold and not Path(given.hold).exists():
                time.sleep(0.1)
            for rival, seconds in found:
                rows.measure(f"torch.compile/{name}/fp16", lambda: measured(rival, seconds))  # noqa: B023


if __name__ == "__main__":
    run(main)
