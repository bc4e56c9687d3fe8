"""Peak memory of exporting a 4 GB checkpoint of 7B-shaped layers, without that of imports.

python benchmarks/memory.py [--directory DIR]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import random_llama, save_result

from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import contract_for
from coatrt.export.decoder import GraphForm, export_decoder
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.codec import encode


def peak_resident_bytes() -> int:
    """Return the peak resident set of this program; getrusage would count the parent's before exec."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def measure(model: Path, output: Path, text: str) -> None:
    """Export both forms and print the growth of the peak resident set, in bytes, and the seconds."""
    import torch

    torch.set_num_threads(2)
    encode(torch.ones(64, 64), text)  # imports and thread pools belong to the interpreter
    before = peak_resident_bytes()
    start = time.monotonic()
    checkpoint = Checkpoint.open(model)
    config = QuantConfig.uniform(checkpoint.matrices, text)
    forms = [GraphForm("engine", "base.onnx", "float16", 2048), GraphForm("cpu", "cpu.onnx", "float32")]
    export_decoder(checkpoint, config, output, forms=forms, contract=contract_for(checkpoint.matrices, 16, 32))
    grown = peak_resident_bytes() - before
    print(json.dumps({"peak_bytes": grown, "seconds": time.monotonic() - start}))


def main() -> None:
    """Create the checkpoint and export it in one process per format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help="work directory; needs 10 GB")
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), Path(options.measure[1]), options.measure[2])
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        work = Path(scratch)
        checkpoint = random_llama(
            work / "model", hidden=4096, inner=11008, layers=9, heads=32, kv_heads=32, vocabulary=32000, tied=False
        )
        size = sum(path.stat().st_size for path in {tensor.file for tensor in checkpoint.tensors.values()})
        for text in ("int4-g64", "int8", "nf3-g64", "fp16"):
            output = work / "out"
            output.mkdir(exist_ok=True)
            command = [sys.executable, __file__, "--measure", str(work / "model"), str(output), text]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append({"format": text, **result, "share": result["peak_bytes"] / size})
            print(rows[-1], flush=True)
    save_result("memory", "python benchmarks/memory.py", {"checkpoint_bytes": size, "rows": rows})
    if max(row["share"] for row in rows) > 0.5:
        sys.exit("over half of the checkpoint's bytes")


if __name__ == "__main__":
    main()
