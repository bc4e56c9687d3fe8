"""coatrt's training step against PEFT's on the GPU, and the seconds of encoding a matrix on the CPU.

Both alternate: two passes of 2 × 128 tokens, where launches dominate, and of 8 × 512, where they do not; then each runs
alone, with its peak memory and, in the smaller size, its launches by part of the step, its calls of CUDA's runtime and
the places where it waits for the GPU.
"""

import gc
import tempfile
from pathlib import Path
from typing import Any

import torch
from coatrt_parts import MODELS, Trainings, encode_seconds
from rows import Rows, arguments, run
from step_profile import peak_memory, profile_step

TINY = {"hidden": 64, "inner": 128, "layers": 2, "heads": 2, "kv_heads": 1, "vocabulary": 40000, "tied": True}
SIZES = {"": (128, 2, 16), "/8x512": (512, 8, 5)}
"""End of a row's key → tokens of a row, rows of a pass, steps."""


def steps(rows: Rows, directory: Path) -> None:
    """Measure the training step in both sizes."""
    dry = rows.dry
    compute = "cpu" if dry else "cuda"
    trainings = {
        end: Trainings(directory, TINY if dry else MODELS["smollm2"], compute, length // 16 if dry else length, batch)
        for end, (length, batch, _) in SIZES.items()
    }

    def compare(end: str) -> dict[str, Any]:
        if not dry:
            torch.cuda.reset_peak_memory_stats()
        found = trainings[end].compare(4 if dry else SIZES[end][2])
        return {**found, **({} if dry else {"peak_mb_both": round(torch.cuda.max_memory_allocated() / 1e6, 1)})}

    def alone(end: str, name: str) -> dict[str, Any]:
        measure = peak_memory if end else profile_step
        return measure(lambda count, between: trainings[end].run(name, count, between), not dry)

    def clean() -> None:
        gc.collect()
        if not dry:
            torch.cuda.empty_cache()

    for end in SIZES:
        rows.measure(f"training/step{end}", lambda end=end: compare(end))
        clean()
    for end in SIZES:
        for name in ("coatrt", "peft"):
            rows.measure(f"training/alone{end}/{name}", lambda end=end, name=name: alone(end, name))
            clean()


def main() -> None:
    """Measure."""
    rows, _ = arguments(__doc__.splitlines()[0])
    dry = rows.dry
    with tempfile.TemporaryDirectory() as scratch:
        steps(rows, Path(scratch) / "model")
    sizes = [(64, 128)] if dry else [(4096, 4096), (11008, 4096)]
    for N, K in sizes:
        for text, quantizer in (
            ("nf3-g64", "feedback"),
            ("int4-g64", "feedback"),
            ("int4-g64", "mse"),
            ("nvfp4", "feedback"),
        ):
            rows.measure(
                f"encode/{N}x{K}/{text}/{quantizer}",
                lambda text=text, quantizer=quantizer, N=N, K=K: encode_seconds(text, quantizer, N, K, 2 * K),
            )


if __name__ == "__main__":
    run(main)
