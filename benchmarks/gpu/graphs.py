"""coatrt's graphs on the CUDA provider: whether they load, where nodes run, and the error of the logits."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from rows import Rows, arguments, run
from runtime import Bound, event_times, session

_TORCH = {"float32": torch.float32, "float16": torch.float16}


class Case:
    """One exported graph with its inputs and the logits expected of it.

    Args:
        directory: of the format, written by coatrt_parts.py.
        activations: float32 or float16.
        dry: on the CPU.
    """

    def __init__(self, directory: Path, activations: str, dry: bool) -> None:
        self.dry, self._device = dry, "cpu" if dry else "cuda"
        self.facts = json.loads((directory.parent / "facts.json").read_text())
        self.case = np.load(directory / "case.npz")
        self.graph = str(directory / activations / f"{activations}.onnx")
        self.activations, dtype = activations, _TORCH[activations]
        lora = np.load(directory.parent / "lora.npz")
        self.tensors = {name: torch.from_numpy(lora[name]).to(self._device, dtype) for name in lora.files}
        shape = (1, self.facts["kv_heads"], self.facts["context"], self.facts["head_dim"])
        for past, present in zip(self.facts["past"], self.facts["present"], strict=True):
            self.tensors[past] = self.tensors[present] = torch.zeros(shape, dtype=dtype, device=self._device)
        logits = torch.full((1, 1, self.facts["vocabulary"]), torch.nan, dtype=dtype, device=self._device)
        self.tensors["logits"] = logits

    def step(self, made: Any, tokens: list[int], start: int) -> Bound:
        """Return the bound call that adds tokens at a position."""

        def given(values: list[int], *shape: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64).view(shape).to(self._device)

        count = len(tokens)
        inputs = {
            "input_ids": given(tokens, 1, count),
            "position_ids": given(list(range(start, start + count)), 1, count),
            "write_index": given([start], 1),
            "logits_index": given([count - 1], 1, 1),
        }
        bound = Bound(made, {**self.tensors, **inputs})
        if not self.dry:
            torch.cuda.synchronize()
        return bound

    def logits(self, made: Any) -> np.ndarray:
        """Return the logits after the prompt and after each token, [1 + steps, V]."""
        prompt, tokens = self.case["prompt"].tolist(), self.case["tokens"].tolist()
        found, start = [], 0
        for part in [prompt, *([token] for token in tokens)]:
            self.step(made, part, start)()
            if not self.dry:
                torch.cuda.synchronize()
            found.append(self.tensors["logits"][0, 0].float().cpu().numpy().copy())
            start += len(part)
        return np.stack(found)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference over the largest logit; NaN stays NaN."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def nodes_by_provider(profile: str) -> dict[str, dict[str, int]]:
    """Return provider → operator → nodes that ran there in the last run of a profile."""
    events = [event for event in json.loads(Path(profile).read_text()) if event.get("cat") == "Node"]
    kernels = {event["name"]: event["args"] for event in events if event["name"].endswith("_kernel_time")}
    found: dict[str, Counter[str]] = {}
    for facts in kernels.values():
        found.setdefault(facts.get("provider", "?").removesuffix("ExecutionProvider"), Counter())[facts["op_name"]] += 1
    return {provider: dict(counts.most_common()) for provider, counts in found.items()}


def check(directory: Path, activations: str, dry: bool, config: dict[str, str] | None = None) -> dict[str, Any]:
    """Load a graph, compare its logits, count its nodes."""
    case = Case(directory, activations, dry)
    with tempfile.TemporaryDirectory() as scratch:
        made = session(case.graph, dry=dry, config=config, profile=f"{scratch}/run")
        logits = case.logits(made)
        where = nodes_by_provider(made.end_profiling())
    expected = case.case["expected"]
    return {
        "relative_error": relative(logits, expected),
        "relative_error_cpu": relative(case.case[f"cpu.{activations}"], expected),
        "nodes": where,
    }


def capture(directory: Path, dry: bool) -> dict[str, Any]:
    """Try to capture a graph of today as a CUDA graph, and time a step without one."""
    case = Case(directory, "float16", dry)
    made = session(case.graph, dry=dry)
    case.logits(made)
    step = case.step(made, [1], 30)
    found: dict[str, Any] = {"step_us": round(1e3 * min(event_times(step, 20, dry=dry)), 1)}
    try:
        session(case.graph, dry=dry, graph=True)
        found["captured"] = True
    except Exception as error:
        found["captured"] = str(error)[:300]
    return found


def with_host_inputs(graph: str) -> str:
    """Write a variant of `graph` that has the cache's ends as inputs instead of computing them, and return its path.

    That arithmetic (Shape, Add, Sub, ReduceMax, Cast) is all that a float16 graph runs outside the CUDA provider, and
    all that prevents its capture.
    """
    model = onnx.load(graph, load_external_data=False)
    host = ("tokens.added", "cache.ends", "cache.last.wide", "cache.filled.wide", "cache.last", "cache.filled")
    kept = [node for node in model.graph.node if not set(node.output) & set(host)]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    for name, shape in (("cache.last", ["B"]), ("cache.filled", [])):
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT32, shape))
    path = Path(graph).with_name("host_inputs.onnx")
    onnx.save(model, path)
    return str(path)


def replayed(directory: Path, dry: bool) -> dict[str, Any]:
    """Run the graph with host inputs, prefill as it is and decode steps as a replayed CUDA graph."""
    case = Case(directory, "float16", dry)
    made = session(with_host_inputs(case.graph), dry=dry, graph=True)
    device, facts = "cpu" if dry else "cuda", case.facts
    case.tensors["cache.last"] = torch.tensor([len(case.case["prompt"]) - 1], dtype=torch.int32, device=device)
    case.tensors["cache.filled"] = torch.tensor(len(case.case["prompt"]), dtype=torch.int32)
    case.step(made, case.case["prompt"].tolist(), 0)()
    found = [case.tensors["logits"][0, 0].float().cpu().numpy().copy()]
    case.tensors["cache.filled"] = torch.tensor(facts["context"], dtype=torch.int32)
    names = ("input_ids", "position_ids", "write_index", "logits_index")
    fixed = {name: torch.zeros(1, *[1] * (name != "write_index"), dtype=torch.int64, device=device) for name in names}
    calls = [Bound(made, {**case.tensors, **fixed}, annotation=number) for number in (1, -1)]
    for at, token in enumerate(case.case["tokens"].tolist(), len(case.case["prompt"])):
        fixed["input_ids"].fill_(token)
        for tensor in (fixed["position_ids"], fixed["write_index"], case.tensors["cache.last"]):
            tensor.fill_(at)
        if not dry:
            torch.cuda.synchronize()
        calls[0]()
        if not dry:
            torch.cuda.synchronize()
        found.append(case.tensors["logits"][0, 0].float().cpu().numpy().copy())
    graph_us, plain_us = (round(1e3 * min(event_times(call, 20, dry=dry)), 1) for call in calls)
    error = relative(np.stack(found), case.case["expected"])
    return {"relative_error": error, "graph_us": graph_us, "no_graph_us": plain_us}


def check_directory(rows: Rows, root: Path) -> None:
    """Check the graphs of one directory; its name begins the keys."""
    places = {path.name: path for path in sorted(root.iterdir()) if path.is_dir()}

    def row(text: str, what: str, work: Callable[..., dict[str, Any]], *more: Any) -> None:
        if text in places:
            rows.measure(f"{root.name}/{text}/{what}", lambda: work(places[text], *more))

    for activations in ("float16", "float32"):
        for text in list(places)[: 3 if rows.dry else None]:
            row(text, activations, check, activations, rows.dry)
    for text in ("int4-g64", "fp16"):
        row(text, "capture", capture, rows.dry)
        row(text, "replayed", replayed, rows.dry)
    for text in ("int8", "int4-g64"):
        row(text, "float16/decoded at load", check, "float16", rows.dry, {"session.disable_quant_qdq": "1"})


def main() -> None:
    """Check every directory."""
    rows, given = arguments(__doc__.splitlines()[0], graphs="graphs")
    for directory in given.graphs.split(","):
        check_directory(rows, Path(directory))


if __name__ == "__main__":
    run(main)
