"""Whole decode steps of ONNX Runtime at batch 1: milliseconds, tokens/s, memory, prefill, and a change of LoRA."""

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from decoder import MODELS, Decoder, mixed
from lora import LORA_FORMS, random_inputs
from products import random_weight
from rows import Rows, arguments, run, summary
from runtime import Bound, event_times, free_memory, session

FILLED, PROMPT, STEPS = 512, 512, 128


class Runner:
    """A decoder in a session, everything bound on the device.

    Args:
        decoder: the graph.
        dry: on the CPU.
        config: session configuration entries.
    """

    def __init__(self, decoder: Decoder, dry: bool, config: dict[str, str] | None = None) -> None:
        self.dry, self._decoder = dry, decoder
        device = self.device = "cpu" if dry else "cuda"
        before = free_memory(dry)
        began = time.perf_counter()
        graph = decoder.graph
        self.session = session(graph.model(), graph.weights, dry=dry, graph=True, config=config, library=graph.library)
        self.load_s = time.perf_counter() - began
        self.session_bytes = before - free_memory(dry)
        shape = decoder.shape
        cache = (1, shape.kv_heads, decoder.slots, shape.width)
        self.tensors: dict[str, torch.Tensor] = {
            "ends": torch.zeros(1, dtype=torch.int32, device=device),
            "last": torch.zeros(1, dtype=torch.int64, device=device),
            "logits": torch.full((1, 1, shape.vocabulary), torch.nan, dtype=torch.float16, device=device),
        }
        for layer in range(shape.layers):
            for part in "kv":
                self.tensors[f"past.{layer}.{part}"] = torch.zeros(cache, dtype=torch.float16, device=device)
                self.tensors[f"present.{layer}.{part}"] = self.tensors[f"past.{layer}.{part}"]
        given = random_inputs(decoder.lora_inputs, device)
        sizes = {name: -(-tensor.nbytes // 256) * 256 for name, tensor in given.items()}
        self.lora = torch.empty(sum(sizes.values()), dtype=torch.uint8, device=device)  # all of it in one buffer
        at = 0
        for name, tensor in given.items():
            here = self.lora[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            self.tensors[name] = here.copy_(tensor)
            at += sizes[name]
        self.ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        total = torch.tensor(decoder.slots, dtype=torch.int32)
        decode = {**self.tensors, "input_ids": self.ids, "total": total}
        self.replayed, self.plain = (Bound(self.session, decode, number) for number in (1, -1))

    def prefill(self, tokens: torch.Tensor) -> Callable[[], None]:
        """Return a call that runs a whole prompt [1, S] into empty caches."""
        count = tokens.shape[1]
        self.tensors["ends"].fill_(count - 1)
        self.tensors["last"].fill_(count - 1)
        total = torch.tensor(count, dtype=torch.int32)
        _wait(self.dry)  # the runtime's stream does not wait for torch's
        return Bound(self.session, {**self.tensors, "input_ids": tokens.to(self.device), "total": total})

    def at(self, position: int, token: int = 5) -> None:
        """Make the next step add `token` at `position`."""
        self.tensors["ends"].fill_(position)
        self.tensors["last"].zero_()
        self.ids.fill_(token)
        _wait(self.dry)

    def greedy(self, step: Callable[[], None], count: int) -> list[float]:
        """Return the milliseconds of each of `count` greedy steps; the next token is chosen on the device."""

        def one() -> None:
            step()
            torch.argmax(self.tensors["logits"], dim=-1, out=self.ids)
            self.tensors["ends"].add_(1)

        self.at(FILLED if not self.dry else 4)
        return event_times(one, count, dry=self.dry)


def consistency(runner: Runner) -> float:
    """Return the largest difference of a step's logits from those of the same tokens as one prompt, relative."""
    count = 9 if runner.dry else 130
    tokens = torch.randint(0, runner._decoder.shape.vocabulary, (1, count), generator=torch.Generator().manual_seed(0))
    runner.prefill(tokens)()
    _wait(runner.dry)
    whole = runner.tensors["logits"].float().clone()
    runner.prefill(tokens[:, :-1].contiguous())()
    _wait(runner.dry)
    runner.at(count - 1, int(tokens[0, -1]))
    runner.replayed()
    _wait(runner.dry)
    return float((runner.tensors["logits"].float() - whole).abs().max() / whole.abs().max())


def _wait(dry: bool) -> None:
    if not dry:
        torch.cuda.synchronize()


def switches(runner: Runner) -> dict[str, Any]:
    """Return milliseconds of a change of the whole LoRA: tensor by tensor, as one buffer, and within the device."""
    if not len(runner.lora):
        return {}
    dry, names = runner.dry, list(runner._decoder.lora_inputs)
    host = runner.lora.cpu().clone() if dry else runner.lora.cpu().pin_memory()
    other = runner.lora.clone()
    apart = [runner.tensors[name].cpu().clone() for name in names]
    if not dry:
        apart = [tensor.pin_memory() for tensor in apart]

    def one_by_one() -> None:
        for name, value in zip(names, apart, strict=True):
            runner.tensors[name].copy_(value, non_blocking=True)

    ways = {
        "tensors": one_by_one,
        "buffer": lambda: runner.lora.copy_(host, non_blocking=True),
        "device": lambda: runner.lora.copy_(other),
    }
    times = {f"switch_{name}_ms": summary(event_times(work, 15, dry=dry)) for name, work in ways.items()}
    return {**times, "lora_bytes": runner.lora.nbytes, "lora_tensors": len(names)}


def kernels(runner: Runner, steps: int = 4) -> dict[str, Any]:
    """Return the kernels of one replayed step: name, how many, microseconds together, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    runner.at(FILLED)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            runner.replayed()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    table = [[event.key[:110], event.count / steps, round(event.self_device_time_total / steps, 2)] for event in events]
    return {
        "kernels": sum(row[1] for row in table),
        "busy_us": round(sum(row[2] for row in table), 1),
        "top": table[:14],
    }


def measured(decoder: Decoder, dry: bool, config: dict[str, str], keep: list[Runner]) -> dict[str, Any]:
    """Load a decoder, leave it in `keep` and measure everything about it."""
    gc.collect()
    free = free_memory(dry)
    runner = Runner(decoder, dry, config)
    keep[:] = [runner]
    shape, filled = decoder.shape, 8 if dry else FILLED
    found: dict[str, Any] = {"load_s": round(runner.load_s, 2), "session_mb": round(runner.session_bytes / 1e6, 1)}
    if not decoder.folded:  # else the graph is for one token
        found["decode_against_prefill"] = consistency(runner)
    runner.at(filled)
    replay = event_times(runner.replayed, 2 if dry else 100, dry=dry)
    found["graph_ms"] = summary(replay, 4)
    loop = runner.greedy(runner.replayed, 2 if dry else STEPS)
    ordered = sorted(loop)
    found |= {
        "greedy_ms": summary(loop, 4),
        "greedy_p99_ms": round(ordered[int(0.99 * len(ordered))], 4),
        "tokens_per_s": round(1e3 * len(loop) / sum(loop), 1),
    }
    runner.at(filled)
    found["no_graph_ms"] = summary(event_times(runner.plain, 2 if dry else 30, dry=dry), 4)
    if not decoder.folded:
        prefill = runner.prefill(torch.randint(0, shape.vocabulary, (1, 12 if dry else PROMPT)))
        found["prefill_ms"] = summary(event_times(prefill, 2 if dry else 8, dry=dry), 3)
    found |= switches(runner)
    cache = 4 * shape.layers * shape.kv_heads * shape.width * filled
    moved = decoder.read_bytes + runner.lora.nbytes + cache
    found |= {
        "weight_bytes": decoder.read_bytes,
        "kv_bytes": cache,
        "bytes_per_token": moved,
        "gb_s": round(moved / found["graph_ms"]["median"] / 1e6, 1),
        "nodes": len(decoder.graph.nodes),
        "peak_mb": round((free - free_memory(dry)) / 1e6, 1),
    }
    return found


@dataclass(frozen=True)
class Variant:
    """What varies besides model and format.

    Args:
        lora: whether there is a LoRA.
        joined: see Decoder.
        form: see Decoder.
        folded: see Decoder.
        cutlass: whether the CUTLASS products are asked for.
        environment: environment variables while the session is made.
    """

    lora: bool = False
    joined: bool = True
    form: str = "fp16"
    folded: bool = False
    cutlass: bool = False
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """The part of a row's key behind model and format."""
        text = f"LoRA {'on' if self.lora else 'off'}/{'joined' if self.joined else 'separate'}"
        text += f"/{self.form}" if self.form != "fp16" else ""
        text += "/folded" if self.folded else ""
        return text + "".join(f"/{name}={value}" for name, value in self.environment)


def case(rows: Rows, model: str, text: str, variant: Variant) -> None:
    """Measure one model in one format; where ONNX Runtime refuses the packed table, with a table in float16."""

    def formats(layer: int, group: str) -> str:
        head = "int8-g128" if text == "mixed" else text
        return head if layer < 0 else mixed(layer, group) if text == "mixed" else text

    key = f"decode/{model}/{text}{'+cutlass' if variant.cutlass else ''}/{variant.label}"
    config = {"ep.cuda.fpa_intb_gemm": "1"} if variant.cutlass else {}
    keep: list[Runner] = []

    def work() -> dict[str, Any]:
        decoder = Decoder(
            MODELS[model],
            formats,
            variant.lora,
            variant.joined,
            64 if rows.dry else 2048,
            form=variant.form,
            folded=variant.folded,
        )
        os.environ.update(variant.environment)
        try:
            return measured(decoder, rows.dry, config, keep)
        finally:
            for name, _ in variant.environment:
                del os.environ[name]

    rows.measure(key, work)
    if keep and not rows.dry:
        rows.measure(f"kernels/{key}", lambda: kernels(keep[0]))


ATTENTION = (
    (("ORT_ENABLE_XQA", "0"), ("ORT_ENABLE_CUDNN_FLASH_ATTENTION", "0")),
    (("ORT_ENABLE_XQA", "0"), ("ORT_ENABLE_CUDNN_FLASH_ATTENTION", "1")),
)
"""Environments that choose flash decoding and cuDNN instead of ONNX Runtime's own choice."""


def main() -> None:
    """Measure, the most important rows first."""
    rows, given = arguments(__doc__.splitlines()[0], rounds="0,1,2,3,4")
    on = Variant(lora=True)
    rounds: list[list[tuple[str, Variant]]] = [
        [("int4-g64", on), ("int4-g64", Variant()), ("fp16", Variant()), ("int4-g32", Variant()), ("fp8", Variant())],
        [
            ("int4-g64", replace(on, joined=False)),
            ("int4-g64", Variant(joined=False)),
            ("int8-g128", Variant()),
            ("mixed", on),
            ("int4-g32", Variant(cutlass=True)),
            ("nvfp4", Variant()),
        ],
        [("int4-g64", replace(on, form=form, folded=folded)) for form in LORA_FORMS for folded in (False, True)],
        [("int4-g64", Variant(environment=chosen)) for chosen in ATTENTION],
        [("mixed", Variant()), ("int4-g32", on), ("fp16", on)],
    ]
    for cases in (rounds[int(number)] for number in given.rounds.split(",")):
        for model in ["tiny"] if rows.dry else ["135m", "7b", "1b"]:
            for text, variant in cases:
                case(rows, model, text, variant)
            random_weight.cache_clear()


if __name__ == "__main__":
    run(main)
