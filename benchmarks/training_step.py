"""A step of configuration-aware training against a step of plain LoRA in PEFT, SmolLM2-135M, in one run.

python benchmarks/training_step.py                   on the CPU (needs peft)
python benchmarks/training_step.py --compute cuda    on a GPU

Both do two forward and backward passes of the same tokens, rank 16 on all 210 linear matrices, AdamW, and alternate:
every step of ours is held against the two of PEFT around it, so that a machine's ups and downs cancel. PEFT's base is
in full precision; ours changes its configuration and solves for the compensation before every pass.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import save_result, smollm2
from peft import LoraConfig, get_peft_model
from torch import Tensor

from coatrt.adapter.compensation import Compensator
from coatrt.adapter.features import ConfigEncoder
from coatrt.adapter.lora import CoaLora
from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import contract_for
from coatrt.configs.space import ConfigSpace
from coatrt.data.examples import Examples
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.modules import load_model
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.input_moments import Calibration, InputMoments
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.distributed import Processes
from coatrt.training.config_sampler import TrainingSampler
from coatrt.training.loop import optimise
from coatrt.training.options import TrainOptions

FORMATS = ("nf3-g64", "int4-g64", "nvfp4", "fp8", "int8")
LIMIT = 1.15
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PeftTraining:
    """Plain LoRA in PEFT on all linear matrices.

    Args:
        checkpoint: the model.
        tokens: int64 [16, length].
        compute: torch device.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: Tensor, compute: str) -> None:
        config = LoraConfig(r=16, lora_alpha=32, target_modules=KINDS)
        self._model = get_peft_model(load_model(checkpoint).to(compute), config)
        self._model.train()
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
        self._tokens, self._compute = tokens, compute

    def step(self, step: int) -> None:
        """Do two forward and backward passes of two rows and one step of the optimizer."""
        rows = self._tokens[[2 * step % 16, (2 * step + 1) % 16]].to(self._compute)
        for _ in range(2):
            logits = self._model(input_ids=rows, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def ours(checkpoint: Checkpoint, tokens: Tensor, compute: str) -> tuple[FakeQuantModel, CoaLora, TrainingSampler]:
    """Return model, compensated LoRA and what draws configurations."""
    codes = CodeStore(checkpoint, "absmax")  # the fastest to make; a step costs the same with all
    formats = tuple(map(WeightFormat.parse, FORMATS))
    space = ConfigSpace(checkpoint.matrices, formats)
    flat = {name: {text: 1e-6 / WeightFormat.parse(text).bits for text in FORMATS} for name in space.model.names}
    sampler = TrainingSampler(space, flat, 3.8, 6.5)
    lora = CoaLora(contract_for(checkpoint.matrices, 16, 32), ConfigEncoder(checkpoint.matrices, formats, flat))
    lora.to(compute)
    model = FakeQuantModel(checkpoint, codes, compute)
    moments = InputMoments(checkpoint, Calibration(tokens))
    lora.compensate(Compensator(model, moments, lora.contract))
    return model, lora, sampler


def alternate(checkpoint: Checkpoint, steps: int, compute: str) -> dict[str, list[float]]:
    """Return the seconds of every step of both, done in turn."""
    tokens = torch.randint(0, 40000, (16, 128), generator=torch.Generator().manual_seed(0))
    peft = PeftTraining(checkpoint, tokens, compute)
    model, lora, sampler = ours(checkpoint, tokens, compute)
    seconds: dict[str, list[float]] = {"coatrt": [], "peft": []}
    started = 0.0

    def wait() -> None:
        if compute != "cpu":
            torch.cuda.synchronize()

    def draw(step: int) -> list[QuantConfig]:
        # Between two of our steps PEFT does one; its time is not ours.
        nonlocal started
        wait()
        now = time.perf_counter()
        if started:
            seconds["coatrt"].append(now - started)
        peft.step(step)
        wait()
        seconds["peft"].append(time.perf_counter() - now)
        started = time.perf_counter()
        return sampler.draw(step)

    options = TrainOptions(formats=FORMATS, steps=steps + 1, batch=2, max_length=128, checkpoint_every=steps + 1)
    with tempfile.TemporaryDirectory() as scratch:
        optimise(model, lora, Examples.of_blocks(tokens), draw, options, Path(scratch), "benchmark", Processes())
    return seconds


def main() -> None:
    """Alternate the two and check the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--compute", default="cpu", help="torch device")
    given = parser.parse_args()
    steps, compute = given.steps, given.compute
    seconds = alternate(smollm2(), steps, compute)
    warm = range(steps // 4, steps)  # the first steps encode and decode what is not in the caches yet
    ratios = sorted(seconds["coatrt"][i] / statistics.mean(seconds["peft"][i : i + 2]) for i in warm)
    result = {
        "seconds": seconds,
        "median_s": {name: statistics.median(values[i] for i in warm) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-len(ratios) // 4]],
        "first_steps_mean_s": statistics.mean(seconds["coatrt"][: steps // 4]),
    }
    more = f" --compute {compute}" if compute != "cpu" else ""
    save_result("training_step" + ("_gpu" if more else ""), f"python benchmarks/training_step.py{more}", result)
    if result["ratio"] > LIMIT:
        sys.exit(f"a step costs {result['ratio']:.2f} times PEFT's")


if __name__ == "__main__":
    main()
