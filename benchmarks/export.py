"""Checkpoint → engine: coatrt's export and build against torch.onnx trace and build, SmolLM2-135M in fp16, one run.

python benchmarks/export.py   (needs onnxscript, which torch.onnx uses: pip install onnxscript)
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import save_result, smollm2

from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import device_profile
from coatrt.engines.builders.builder import EngineShapes, build_engine
from coatrt.export.decoder import GraphForm, export_decoder
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.modules import load_model

CONTEXT, PREFILL = 2048, 512


def ours(checkpoint: Checkpoint, directory: Path) -> dict[str, float]:
    """Write the engine form and build it."""
    start = time.monotonic()
    form = GraphForm("engine", "base.onnx", "float16", CONTEXT)
    export_decoder(checkpoint, QuantConfig.uniform(checkpoint.matrices, "fp16"), directory, forms=[form])
    written = time.monotonic()
    record = build_engine(
        directory / "base.onnx", directory / "e.engine", device_profile("rtx-3060"), shapes=EngineShapes(1, PREFILL)
    )
    return {"export_s": written - start, "build_s": time.monotonic() - written, "engine_bytes": record.bytes}


class _WithCache(torch.nn.Module):
    """The transformers model with a growing key/value cache as plain tensors, the form torch.onnx can trace."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor) -> tuple[Any, ...]:
        from transformers import DynamicCache

        cache = DynamicCache(tuple(zip(past[::2], past[1::2], strict=True)))
        out = self.model(input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True)
        presents = [part for layer in out.past_key_values.layers for part in (layer.keys, layer.values)]
        return (out.logits, *presents)


def traced(checkpoint: Checkpoint, directory: Path) -> dict[str, float]:
    """Trace the same model with torch.onnx in fp16 and build it."""
    start = time.monotonic()
    model = load_model(checkpoint, torch.float16)
    config = model.config
    shape = (1, config.num_key_value_heads, 8, config.hidden_size // config.num_attention_heads)
    past = [torch.zeros(shape, dtype=torch.float16) for _ in range(2 * config.num_hidden_layers)]
    names = [f"past.{i}" for i in range(len(past))]
    arguments = (torch.zeros(1, 4, dtype=torch.int64), torch.arange(8, 12)[None], *past)
    sequence, total = torch.export.Dim("S", min=1, max=PREFILL), torch.export.Dim("P", min=1, max=CONTEXT)
    shapes = ({1: sequence}, {1: sequence}, tuple({2: total} for _ in past))
    with torch.no_grad():
        torch.onnx.export(
            _WithCache(model).eval(),
            arguments,
            str(directory / "traced.onnx"),
            dynamo=True,
            opset_version=20,
            input_names=["input_ids", "position_ids", *names],
            dynamic_shapes=shapes,
            external_data=True,
            output_names=["logits", *(f"present.{i}" for i in range(len(past)))],
        )
    written = time.monotonic()
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    subprocess.run([sys.executable, __file__, "--build", str(directory)], check=True, env=environment)
    size = (directory / "traced.engine").stat().st_size
    return {"export_s": written - start, "build_s": time.monotonic() - written, "engine_bytes": size}


def build_traced(directory: Path) -> None:
    """Build the traced graph: cache lengths up to the context, one profile."""
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import Profile, engine_bytes_from_network, network_from_onnx_path

    builder, network, parser = network_from_onnx_path(str(directory / "traced.onnx"), strongly_typed=True)
    profile = Profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        most = CONTEXT - PREFILL if tensor.name.startswith("past") else PREFILL
        least = [1 if size < 0 else size for size in tensor.shape]
        profile.add(tensor.name, least, least, [most if size < 0 else size for size in tensor.shape])
    config = CreateConfigRTX(compute_capabilities=[(8, 6)], profiles=[profile])
    with (directory / "traced.engine").open("wb") as stream:
        stream.write(memoryview(engine_bytes_from_network((builder, network, parser), config=config)))


def main() -> None:
    """Alternate the two, three times each, and save medians and ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    if options.build is not None:
        build_traced(options.build)
        return
    checkpoint = smollm2()
    rows: dict[str, list[dict[str, float]]] = {"coatrt": [], "torch.onnx": []}
    for _ in range(options.repeat):
        for name, run in (("coatrt", ours), ("torch.onnx", traced)):
            with tempfile.TemporaryDirectory() as scratch:
                rows[name].append(run(checkpoint, Path(scratch)))
            print(name, rows[name][-1], flush=True)
    totals = {name: statistics.median(r["export_s"] + r["build_s"] for r in many) for name, many in rows.items()}
    ratio = totals["torch.onnx"] / totals["coatrt"]
    save_result("export", "python benchmarks/export.py", {"runs": rows, "median_total_s": totals, "ratio": ratio})
    if ratio < 5:
        sys.exit(f"only {ratio:.1f} times faster")


if __name__ == "__main__":
    main()
