"""Engine bytes against ideal bytes: the whole SmolLM2-135M per format and GPU, and a random 1B-shaped model.

python benchmarks/engine_size.py
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from common import random_llama, save_result, smollm2

from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import contract_for
from coatrt.devices.profiles import device_profile
from coatrt.engines.builders.builder import BuildRecord, EngineShapes, build_engine
from coatrt.export.decoder import GraphForm, export_decoder
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.code_cache import CodeStore

DEVICES = ("t4", "rtx-3060", "rtx-4090", "rtx-5090")
FORMATS = ("int8", "int4-g64", "nf2-g64", "nf3-g64", "nf4-g64", "fp8", "nvfp4", "fp16")
LIMITS = {"int8": 1.10, "int4-g64": 1.20, "nf2-g64": 1.35, "nf3-g64": 1.35}


def export(checkpoint: Checkpoint, text: str, directory: Path, lora: bool) -> Path:
    """Write the engine form with every matrix in one format."""
    directory.mkdir(exist_ok=True)
    form = GraphForm("engine", "base.onnx", "float16", 2048)
    contract = contract_for(checkpoint.matrices, 16, 32) if lora else None
    config = QuantConfig.uniform(checkpoint.matrices, text)
    codes = CodeStore(checkpoint) if lora else None
    export_decoder(checkpoint, config, directory, forms=[form], contract=contract, codes=codes)
    return directory / "base.onnx"


def row(checkpoint: Checkpoint, text: str, name: str, record: BuildRecord) -> dict[str, Any]:
    """Return one line of the result."""
    model = checkpoint.matrices
    ideal = QuantConfig.uniform(model, text).nbytes(model) + model.other_bytes
    found = {
        "format": text,
        "device": name,
        "engine_bytes": record.bytes,
        "ideal_bytes": ideal,
        "ratio": record.bytes / ideal,
        "rest_bytes": record.bytes - ideal,
        "seconds": record.seconds,
    }
    print(
        f"{text:<10} {name:<10} {record.bytes / 1e6:8.1f} MB, ideal {ideal / 1e6:8.1f}: {found['ratio']:.3f}",
        flush=True,
    )
    return found


def main() -> None:
    """Build everything and check the limits."""
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        checkpoint = smollm2()
        for text in FORMATS:
            graph = export(checkpoint, text, work / text, lora=True)
            for name in DEVICES:
                if not device_profile(name).supports(
                    QuantConfig.uniform(checkpoint.matrices, text)["model.embed_tokens"]
                ):
                    continue
                record = build_engine(graph, work / "e.engine", device_profile(name), shapes=EngineShapes(1, 512))
                rows.append(row(checkpoint, text, name, record))
                # SM75 keeps a copy of the norm kernel per layer, 8 MB in any format (docs/evidence/engines.md).
                if device_profile(name).sm >= 80 and rows[-1]["ratio"] > LIMITS.get(text, 9):
                    failed.append(rows[-1])
        large = random_llama(
            work / "1b", hidden=2048, inner=8192, layers=16, heads=32, kv_heads=8, vocabulary=128256, tied=True
        )
        graph = export(large, "int4-g64", work / "1b-int4", lora=False)
        record = build_engine(graph, work / "e.engine", device_profile("rtx-3060"), shapes=EngineShapes(1, 512))
        billion = row(large, "int4-g64", "rtx-3060", record)
    save_result("engine_size", "python benchmarks/engine_size.py", {"smollm2_135m": rows, "random_1b": billion})
    if failed or billion["ratio"] > 1.06:
        sys.exit(f"over the limit: {failed} {billion}")


if __name__ == "__main__":
    main()
