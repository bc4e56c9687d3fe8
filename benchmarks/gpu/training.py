"""coatrt's training step against PEFT's on the GPU, and the seconds that encoding a matrix takes on the CPU."""

from typing import Any

import torch
from coatrt_parts import MODELS, encode_seconds, training_step
from rows import arguments, run

TINY = {"hidden": 64, "inner": 128, "layers": 2, "heads": 2, "kv_heads": 1, "vocabulary": 40000, "tied": True}


def step(dry: bool) -> dict[str, Any]:
    """Return the figures of the training-step benchmark and the memory that both models take together."""
    found = training_step(TINY if dry else MODELS["smollm2"], "cpu" if dry else "cuda", 4 if dry else 40)
    if not dry:
        found["peak_mb_both"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return found


def main() -> None:
    """Measure."""
    rows, _ = arguments(__doc__.splitlines()[0])
    dry = rows.dry
    rows.measure("training/step", lambda: step(dry))
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
