"""Engine bytes beyond weights, scales and norms, for the model in coatrt/planning/engine_size.py.

python benchmarks/engine_overhead.py
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import random_config, random_llama, save_result, smollm2

from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import contract_for
from coatrt.configs.space import ConfigSpace
from coatrt.devices.profiles import device
from coatrt.engines.builders.builder import EngineShapes, build_engine
from coatrt.export.decoder import GraphForm, export_decoder
from coatrt.models.checkpoint import Checkpoint
from coatrt.planning.engine_size import engine_overhead
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.weight_format import WeightFormat

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
)
MIXED = ((("nf3-g64", "int4-g64", "int8"), 86), (("nf3-g64", "int4-g64", "int8", "nvfp4"), 120))


def row(checkpoint: Checkpoint, name: str, config: QuantConfig, sm: int, codes: CodeStore | None) -> dict[str, Any]:
    """Build one engine and compare its bytes with the model's."""
    model = checkpoint.matrices
    with tempfile.TemporaryDirectory() as scratch:
        form = GraphForm("engine", "base.onnx", "float16", 2048)
        contract = contract_for(model, 16, 32)
        export_decoder(checkpoint, config, Path(scratch), forms=[form], contract=contract, codes=codes)
        graph, engine = Path(scratch) / "base.onnx", Path(scratch) / "e.engine"
        record = build_engine(graph, engine, device(DEVICES[sm]), shapes=EngineShapes(1, 512))
    ideal, predicted = config.nbytes(model) + model.other_bytes, engine_overhead(config, model, sm)
    layers = 1 + max(matrix.layer for matrix in model.matrices)
    found = {
        "what": name,
        "layers": layers,
        "sm": sm,
        "engine_bytes": record.bytes,
        "ideal_bytes": ideal,
        "overhead_bytes": record.bytes - ideal,
        "predicted_overhead_bytes": predicted,
    }
    print(found, flush=True)
    return found


def main() -> None:
    """Build all."""
    checkpoint, rng, rows = smollm2(), np.random.default_rng(5), []
    codes = CodeStore.default(checkpoint)
    for text, sm in UNIFORM:
        rows.append(row(checkpoint, text, QuantConfig.uniform(checkpoint.matrices, text), sm, codes))
    for texts, sm in MIXED:
        space = ConfigSpace(checkpoint.matrices, tuple(WeightFormat.parse(text) for text in texts))
        rows.append(row(checkpoint, "random over " + ", ".join(texts), random_config(space, rng), sm, codes))
    with tempfile.TemporaryDirectory() as scratch:
        for layers in (10, 20):
            small = random_llama(
                Path(scratch) / str(layers),
                hidden=512,
                inner=1536,
                layers=layers,
                heads=8,
                kv_heads=4,
                vocabulary=16384,
                tied=False,
            )
            for text, sm in (("int8", 86), ("nvfp4", 120)):
                rows.append(row(small, text, QuantConfig.uniform(small.matrices, text), sm, None))
    save_result("engine_overhead", "python benchmarks/engine_overhead.py", {"rows": rows})


if __name__ == "__main__":
    main()
