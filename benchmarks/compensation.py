"""The output error that a closed-form LoRA could remove: that of the best low-rank part of W − Q(W).

python benchmarks/compensation.py
"""

from collections import defaultdict
from statistics import mean
from typing import Any

import torch
from common import save_result, smollm2
from method.tasks import sotu

from coatrt.data.documents import batches
from coatrt.models.tokenizer import load_tokenizer
from coatrt.quantization.codec import decode, encode
from coatrt.quantization.gptq import InverseFactors
from coatrt.quantization.input_moments import Calibration, InputMoments
from coatrt.quantization.quantizers import Quantizer

LAYERS = (3, 14, 26)
FORMATS = ("nf2-g64", "nf3-g64", "nf4-g64")
QUANTIZERS: tuple[Quantizer, ...] = ("mse", "gptq")
RANKS = (0, 16, 32)
BLOCKS = 32
DAMPING = 1e-4  # share of the mean energy of the inputs, so that constant-zero inputs have a factor too


def errors(weight: torch.Tensor, decoded: torch.Tensor, moment: torch.Tensor) -> list[float]:
    """Return ‖(W − Q(W) − R) H^½‖ / ‖W H^½‖ for the best R of each rank: Eckart and Young in the inputs' metric."""
    damped = moment.double() + DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    root = torch.linalg.cholesky(damped).float()
    squares = torch.linalg.svdvals((weight - decoded) @ root).square()
    whole = (weight @ root).square().sum()
    return [float((squares[rank:].sum() / whole).sqrt()) for rank in RANKS]


def main() -> None:
    """Measure the matrices of three layers and write the means per format and quantizer."""
    checkpoint = smollm2()
    train = sotu(load_tokenizer(checkpoint.directory)).train
    calibration = Calibration.of(train[batches(len(train), BLOCKS, 0, 0)])
    moments = InputMoments(checkpoint, calibration)
    factors, columns = InverseFactors(), defaultdict[tuple[str, Quantizer], list[list[float]]](list)
    for matrix in checkpoint.matrices.matrices:
        if matrix.is_table or matrix.layer not in LAYERS:
            continue
        weight, moment = checkpoint.tensor(f"{matrix.name}.weight").float(), moments.get(matrix.name)
        for text in FORMATS:
            for quantizer in QUANTIZERS:
                decoded = decode(encode(weight, text, quantizer, moment, factors=factors))
                columns[text, quantizer].append(errors(weight, decoded, moment))
    rows: list[dict[str, Any]] = [
        {"format": text, "quantizer": quantizer, "errors": [mean(column) for column in zip(*every, strict=True)]}
        for (text, quantizer), every in columns.items()
    ]
    for row in rows:
        print(row["format"], row["quantizer"], *(f"{value:.4f}" for value in row["errors"]))
    facts = {"layers": LAYERS, "ranks": RANKS, "matrices": len(next(iter(columns.values()))), "rows": rows}
    save_result("compensation", "python benchmarks/compensation.py", facts)


if __name__ == "__main__":
    main()
