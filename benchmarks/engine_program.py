"""The decode step of engines by format and GPU: kernels per layer, weights decoded in every step, bytes, seconds.

python benchmarks/engine_program.py

Layers of SmolLM2's width with random weights. Engines of 2 and of 6 layers of each kind give the cost of a layer.
"""

import tempfile
from pathlib import Path
from typing import Any

from common import random_llama, save_result

from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import contract_for
from coatrt.devices.profiles import device_profile
from coatrt.engines.builders.builder import EngineShapes, build_engine
from coatrt.engines.measure.engine_program import decoded_weights, engine_program
from coatrt.export.decoder import GraphForm, export_decoder
from coatrt.models.checkpoint import Checkpoint

CASES = (
    *(("rtx-4090", fmt) for fmt in ("int4-g64", "int8", "int8-g64", "fp8", "nf4-g64", "nf3-g64", "nf2-g64", "fp16")),
    ("rtx-5090", "nvfp4"),
    ("rtx-5090", "int4-g64"),
    ("t4", "int8"),
)
FEW, MANY = 2, 6


def built(model: Checkpoint, device: str, fmt: str, lora: bool) -> dict[str, Any]:
    """Build one engine and return its figures."""
    contract = contract_for(model.matrices, 16, 32) if lora else None
    with tempfile.TemporaryDirectory() as scratch:
        form, place = GraphForm("engine", "base.onnx", "float16", 2048), Path(scratch)
        export_decoder(model, QuantConfig.uniform(model.matrices, fmt), place, forms=[form], contract=contract)
        record = build_engine(place / form.file, place / "e", device_profile(device), shapes=EngineShapes(1, 512))
        program = engine_program(place / "e")
    decoded = [name for name in decoded_weights(program) if name.startswith("model.layers.1.")]
    kinds = sorted(name.removeprefix("model.layers.1.") for name in decoded)
    return {"kernels": len(program), "decoded": kinds, "bytes": record.bytes, "seconds": record.seconds}


def main() -> None:
    """Build all."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        few, many = (
            random_llama(
                Path(scratch) / str(layers),
                hidden=576,
                inner=1536,
                layers=layers,
                heads=9,
                kv_heads=3,
                vocabulary=4096,
                tied=True,
            )
            for layers in (FEW, MANY)
        )
        for device, fmt in CASES:
            for lora in (False, True):
                small, large = built(few, device, fmt, lora), built(many, device, fmt, lora)
                per_layer = {name: (large[name] - small[name]) / (MANY - FEW) for name in ("kernels", "bytes")}
                row = {"device": device, "format": fmt, "lora": lora, "per_layer": per_layer, **large}
                print(row, flush=True)
                rows.append(row)
    save_result("engine_program", "python benchmarks/engine_program.py", {"layers": MANY, "rows": rows})


if __name__ == "__main__":
    main()
