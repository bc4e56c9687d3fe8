"""Engine bytes beyond weights, scales and norms, and the model of them for plans.

python benchmarks/engine_overhead.py [--fit]

Builds every engine of the list, then fits coatrt/planning/engine_size.json by least squares; --fit fits the existing
result without building.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, random_config, random_llama, save_result, smollm2

from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import contract_for
from coatrt.configs.space import ConfigSpace
from coatrt.devices.profiles import device_profile
from coatrt.engines.builders.builder import EngineShapes, build_engine
from coatrt.export.decoder import GraphForm, export_decoder
from coatrt.models.checkpoint import Checkpoint
from coatrt.planning import engine_size
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.json_data import read_as, write_json

DEVICES = {75: "t4", 86: "rtx-3060", 89: "rtx-4090", 120: "rtx-5090"}
UNIFORM = (
    ("int8", 86),
    ("int4-g64", 86),
    ("nf2-g64", 86),
    ("nf3-g64", 86),
    ("nf4-g64", 86),
    ("nvfp4", 120),
    ("fp8", 89),
    ("int8", 75),
    ("nf3-g64", 75),
    ("fp16", 86),
)
MIXED = ((("nf3-g64", "int4-g64", "int8"), 86), (("nf3-g64", "int4-g64", "int8", "nvfp4"), 120))


KINDS = ("int8", "int4", "fp8", "nvfp4", "nf2", "nf3", "nf4")


def engines(scratch: Path) -> Iterator[tuple[str, Checkpoint, QuantConfig, int]]:
    """Yield (name, model, configuration, compute capability) of every engine of the list."""
    checkpoint, rng = smollm2(), np.random.default_rng(5)
    for text, sm in UNIFORM:
        yield text, checkpoint, QuantConfig.uniform(checkpoint.matrices, text), sm
    for texts, sm in MIXED:
        space = ConfigSpace(checkpoint.matrices, tuple(WeightFormat.parse(text) for text in texts))
        yield "random over " + ", ".join(texts), checkpoint, random_config(space, rng), sm
    for layers in (10, 20):
        small = random_llama(
            scratch / str(layers),
            hidden=512,
            inner=1536,
            layers=layers,
            heads=8,
            kv_heads=4,
            vocabulary=16384,
            tied=False,
        )
        for text, sm in (("int8", 86), ("nvfp4", 120)):
            yield text, small, QuantConfig.uniform(small.matrices, text), sm


def built_bytes(checkpoint: Checkpoint, config: QuantConfig, sm: int) -> int:
    """Build one engine and return its bytes."""
    with tempfile.TemporaryDirectory() as name:
        form = GraphForm("engine", "base.onnx", "float16", 2048)
        contract, codes = contract_for(checkpoint.matrices, 16, 32), CodeStore(checkpoint)
        export_decoder(checkpoint, config, Path(name), forms=[form], contract=contract, codes=codes)
        graph, engine = Path(name) / "base.onnx", Path(name) / "e.engine"
        return build_engine(graph, engine, device_profile(DEVICES[sm]), shapes=EngineShapes(1, 512)).bytes


def terms(config: QuantConfig, checkpoint: Checkpoint, sm: int) -> list[float]:
    """Return the features of the model: base, layers, layers on SM75, kinds, padded nvfp4."""
    matrices = checkpoint.matrices.matrices
    layers = 1 + max(matrix.layer for matrix in matrices)
    used = {fmt.kind for fmt in config.formats.values()}
    padded = sum(config[m.name].nbytes(m.N, m.K) for m in matrices if config[m.name].kind == "nvfp4" and m.N % 128)
    return [1, layers, layers * (sm == 75), *(float(kind in used) for kind in KINDS), padded]


def fit(rows: list[list[float]], overheads: list[int]) -> None:
    """Write coatrt/planning/engine_size.json: the least-squares fit, to a thousand bytes."""
    coefficients = np.linalg.lstsq(np.array(rows), np.array(overheads, dtype=float), rcond=None)[0]
    base, per_layer, per_layer_sm75, *per_format = (1000 * round(value / 1000) for value in coefficients[:-1])
    write_json(
        Path(engine_size.__file__).with_suffix(".json"),
        {
            "base": base,
            "per_layer": per_layer,
            "per_layer_sm75": per_layer_sm75,
            "per_format": dict(zip(KINDS, per_format, strict=True)),
            "nvfp4_padding": round(float(coefficients[-1]), 3),
        },
    )


def main() -> None:
    """Build all engines, or read the result, and fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="only fit, to the existing result")
    only_fit = parser.parse_args().fit
    path = RESULTS / "engine_overhead.json"
    known = {
        (row["what"], row["layers"], row["sm"]): row
        for row in read_as(path, dict[str, Any], "result", "remove it")["rows"]
    }
    rows: list[dict[str, Any]] = []
    inputs = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, checkpoint, config, sm in engines(Path(scratch)):
            model = checkpoint.matrices
            ideal, layers = config.nbytes(model) + model.other_bytes, 1 + max(matrix.layer for matrix in model.matrices)
            size = known[name, layers, sm]["engine_bytes"] if only_fit else built_bytes(checkpoint, config, sm)
            row = {"what": name, "layers": layers, "sm": sm, "engine_bytes": size, "ideal_bytes": ideal}
            rows.append({**row, "overhead_bytes": size - ideal})
            inputs.append(terms(config, checkpoint, sm))
            if only_fit:
                assert ideal == known[name, layers, sm]["ideal_bytes"], name
            print(rows[-1], flush=True)
    fit(inputs, [row["overhead_bytes"] for row in rows])
    if not only_fit:
        save_result("engine_overhead", "python benchmarks/engine_overhead.py", {"rows": rows})


if __name__ == "__main__":
    main()
