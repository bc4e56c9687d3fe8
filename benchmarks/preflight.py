"""Seconds and memory of the preflight: SmolLM2-135M, and a checkpoint of 7B-shaped layers.

python benchmarks/preflight.py [--directory DIR]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import random_llama, save_result, smollm2
from memory import peak_resident_bytes

from coatrt.export.preflight import compare
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.modules import empty_model
from coatrt.models.spec import DecoderSpec


def measure(model: Path) -> None:
    """Print the seconds, the growth of the peak resident set in bytes, and the difference of logits."""
    import onnxruntime
    import torch

    torch.set_num_threads(2)
    checkpoint = Checkpoint.open(model)
    empty_model(checkpoint)  # imports belong to the interpreter
    assert onnxruntime.__version__
    before, start = peak_resident_bytes(), time.monotonic()
    difference = compare(checkpoint, DecoderSpec.from_config(checkpoint.config))
    seconds, grown = time.monotonic() - start, peak_resident_bytes() - before
    print(json.dumps({"seconds": seconds, "peak_bytes": grown, "difference": difference}))


def main() -> None:
    """Create the checkpoint, and compare each model in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help="work directory; needs 4 GB")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        large = random_llama(
            Path(scratch), hidden=4096, inner=11008, layers=6, heads=32, kv_heads=32, vocabulary=32000, tied=False
        )
        for name, checkpoint in (("SmolLM2-135M", smollm2()), ("six 7B-shaped layers, random float16", large)):
            command = [sys.executable, __file__, "--measure", str(checkpoint.directory)]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append({"model": name, **result})
            print(rows[-1], flush=True)
    save_result("preflight", "python benchmarks/preflight.py", {"rows": rows})


if __name__ == "__main__":
    main()
