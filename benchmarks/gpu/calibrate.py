"""`coatrt devices calibrate --backend cuda` of random models, and steps of random configurations that it predicts.

The maps are drawn matrix by matrix and were not timed before. Each is measured and compared with two predictions: from
this GPU's timings, and from the planner's constants for such GPUs.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from backend_models import RandomModel, loaded
from decoder import MODELS
from rows import Rows, arguments, run

from coatrt.configs.config import QuantConfig
from coatrt.devices.probe import probe
from coatrt.devices.profiles import device_profile
from coatrt.engines.measure import cuda_timings
from coatrt.engines.measure.cuda_timings import time_space
from coatrt.engines.measure.whole_decoders import decode_seconds
from coatrt.engines.runtime.cuda import CudaDecoder
from coatrt.planning.cuda_latency import CudaLatency
from coatrt.planning.latency import LatencyModel, products_seconds
from coatrt.planning.measured_latency import MeasuredLatency
from coatrt.planning.memory import Workload
from coatrt.quantization.weight_format import WeightFormat

FORMATS = ("int4-g64", "int8-g128", "nvfp4")
CONTEXT, MAPS = 1024, 10
"""Slots that are filled, between those that are timed; maps for each model."""


def random_map(number: int) -> dict[tuple[int, str], str]:
    """Return a format for every layer and kind."""
    rng = np.random.default_rng(number)
    weights = rng.dirichlet(np.ones(len(FORMATS)))  # maps with different averages, not a third of each kind
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    found = {(layer, kind): str(rng.choice(FORMATS, p=weights)) for layer in range(64) for kind in kinds}
    head = str(rng.choice(FORMATS[:2]))
    return {**found, (-1, "embed_tokens"): head, (-1, "lm_head"): head}


def decoder_of(directory: Path, model: RandomModel, dry: bool) -> CudaDecoder:
    """Write a model, load it and bind a random LoRA."""
    directory.mkdir()
    model.write(directory)
    decoder = loaded(directory, model, dry)
    lora = model.random_lora(np.random.default_rng(0))
    if lora is not None:
        decoder.set_lora(lora)
    return decoder


def workload_of(model: RandomModel, dry: bool) -> Workload:
    """Return the workload of the model's decoder."""
    inner = max(matrix.K for matrix in model.matrices.targets if matrix.kind == "down_proj")
    lora = 16 * sum(matrix.N + matrix.K for matrix in model.matrices.targets) if model.contract is not None else 0
    return Workload(model._spec, inner, lora, 64 if dry else 2048, 1, 512, 2)


def timings(name: str, dry: bool) -> MeasuredLatency:
    """Return the timings of a model."""
    with tempfile.TemporaryDirectory() as scratch:

        def made(config: QuantConfig, lora: bool) -> CudaDecoder:
            text = str(next(iter(config.formats.values())))
            model = RandomModel(MODELS[name], lambda layer, kind: text, lora)
            return decoder_of(Path(scratch) / f"{text} {lora}", model, dry)

        model = RandomModel(MODELS[name], lambda layer, kind: FORMATS[0], True)
        gpu = "" if dry else probe()[0].name
        return time_space(
            model.matrices,
            [WeightFormat.parse(text) for text in FORMATS],
            workload_of(model, dry),
            made,
            "h100" if dry else probe()[0].id,
            gpu=gpu,
            tokens=(1, 4) if dry else (1, 512),
            contexts=(16, 48) if dry else (128, 2048),
            provider="cpu" if dry else "cuda",
        )


def step(name: str, number: int, lora: bool, known: MeasuredLatency, dry: bool) -> dict[str, Any]:
    """Measure a step of a random map, and return it with both predictions."""
    drawn, context = random_map(number), 32 if dry else CONTEXT
    model = RandomModel(MODELS[name], lambda layer, kind: drawn[layer, kind], lora)
    with tempfile.TemporaryDirectory() as scratch:
        decoder = decoder_of(Path(scratch) / "map", model, dry)
        measured = float(np.median([decode_seconds(decoder, context=context) for _ in range(2 if dry else 5)]))
    matrices, work = model.matrices, workload_of(model, dry)
    config = QuantConfig({m.name: WeightFormat.parse(drawn[m.layer, m.kind]) for m in matrices.matrices})

    def predicted(latency: LatencyModel) -> float:
        return products_seconds(latency, matrices, config, 1, 1) + latency.rest_seconds(matrices, work, 1, context)

    found = {"bits": round(config.average_bits(matrices), 3), "measured_ms": round(1e3 * measured, 4)}
    ways: dict[str, LatencyModel] = {"timings": known}
    profile = device_profile(known.device)
    if CudaLatency.serves(profile):
        ways["constants"] = CudaLatency(profile)
    for way, latency in ways.items():
        seconds = predicted(latency)
        found |= {f"{way}_ms": round(1e3 * seconds, 4), f"{way}_error": round(seconds / measured - 1, 4)}
    return found


def measure(rows: Rows, name: str) -> None:
    """Time a model, and predict random maps of it."""
    keys = [f"calibrate/{name}/map {number}/{'lora' if number % 4 else 'base'}" for number in range(MAPS)]
    if rows.has(*keys):
        return
    kept: list[MeasuredLatency] = []

    def calibrated() -> dict[str, Any]:
        kept.append(timings(name, rows.dry))
        made = kept[0]
        us = {f"{p.K}x{p.N}/{p.format}/M{p.tokens}": round(1e6 * p.seconds, 3) for p in made.products}
        rests = {
            f"{r.tokens} tokens/{r.context} slots/{'lora' if r.shape[-1] else 'base'}": round(1e3 * r.seconds, 4)
            for r in made.rests
        }
        return {"products_us": us, "rests_ms": rests, "source": made.source}

    rows.measure(f"calibrate/{name}/timings", calibrated)
    if not kept:  # rows of an earlier run: timings are not saved between runs, and current ones are needed
        kept.append(timings(name, rows.dry))
    for number, key in enumerate(keys):
        rows.measure(key, lambda number=number, key=key: step(name, number, key.endswith("lora"), kept[0], rows.dry))


def main() -> None:
    """Measure."""
    rows, _ = arguments(__doc__.splitlines()[0])
    if rows.dry:
        cuda_timings._WORKING_SET, cuda_timings._BUDGET, cuda_timings._REPLAYS = 1 << 16, 0.0, 2
    for name in ("tiny",) if rows.dry else ("135m", "1b"):
        measure(rows, name)


if __name__ == "__main__":
    run(main)
