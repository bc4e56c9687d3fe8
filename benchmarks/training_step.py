"""A step of configuration-aware training against a step of plain LoRA in PEFT, SmolLM2-135M, in one run.

python benchmarks/training_step.py                   on the CPU (needs peft)
python benchmarks/training_step.py --compute cuda    on a GPU

Both do two forward and backward passes of the same tokens, rank 16 on all 210 linear matrices, AdamW, and alternate:
every step of coatrt is compared with the two of PEFT around it, so that the machine's drift cancels. PEFT's base is
in full precision; coatrt changes its configuration and solves for the compensation before every pass.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
        tokens: int64 [rows, length].
        compute: torch device.
        batch: rows of a pass.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: Tensor, compute: str, batch: int = 2) -> None:
        config = LoraConfig(r=16, lora_alpha=32, target_modules=KINDS)
        self._model = get_peft_model(load_model(checkpoint).to(compute), config)
        self._model.train()
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
        self._tokens, self._compute, self._batch = tokens, compute, batch

    def step(self, step: int) -> None:
        """Do two forward and backward passes of the same rows and one step of the optimizer."""
        indices = (torch.arange(self._batch) + self._batch * step) % len(self._tokens)
        rows = self._tokens[indices].to(self._compute)
        for _ in range(2):
            logits = self._model(input_ids=rows, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class OurTraining:
    """coatrt's own loop with a compensated LoRA.

    Args:
        checkpoint: the model.
        tokens: int64 [rows, length].
        compute: torch device.
        batch: rows of a pass.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: Tensor, compute: str, batch: int = 2) -> None:
        codes = CodeStore(checkpoint, "absmax")  # the fastest to encode; a step costs the same with all
        formats = tuple(map(WeightFormat.parse, FORMATS))
        space = ConfigSpace(checkpoint.matrices, formats)
        flat = {name: {text: 1e-6 / WeightFormat.parse(text).bits for text in FORMATS} for name in space.model.names}
        self._sampler = TrainingSampler(space, flat, 3.8, 6.5)
        contract = contract_for(checkpoint.matrices, 16, 32)
        self._lora = CoaLora(contract, ConfigEncoder(checkpoint.matrices, formats, flat)).to(compute)
        self._model = FakeQuantModel(checkpoint, codes, compute)
        moments = InputMoments(checkpoint, Calibration(tokens[:, :128]))
        self._lora.compensate(Compensator(self._model, moments, contract))
        self._tokens, self._batch = tokens, batch

    def warm(self) -> None:
        """Encode and decode every matrix in every format, as the first steps of a training do."""
        for text in FORMATS:
            self._model.set_config(QuantConfig.uniform(self._model.checkpoint.matrices, text))

    def run(self, steps: int, between: Callable[[int], None]) -> None:
        """Do some steps, calling `between` with their count before each and after the last."""

        def draw(step: int) -> list[QuantConfig]:
            between(step)
            return self._sampler.draw(step)

        count = steps + 1  # the last one ends with a checkpoint
        options = TrainOptions(
            formats=FORMATS, steps=count, batch=self._batch, max_length=self._tokens.shape[1], checkpoint_every=count
        )
        data = Examples.of_blocks(self._tokens)
        with tempfile.TemporaryDirectory() as scratch:
            optimise(self._model, self._lora, data, draw, options, Path(scratch), "benchmark", Processes())


def tokens_of(length: int) -> Tensor:
    """Return 16 rows of random tokens, up to 512 long; shorter rows are prefixes of longer ones."""
    longest = torch.randint(0, 40000, (16, 512), generator=torch.Generator().manual_seed(0))
    return longest[:, :length].contiguous()


def alternate(peft: PeftTraining, ours: OurTraining, steps: int, compute: str) -> dict[str, list[float]]:
    """Return the seconds of every step of both, in alternation."""
    seconds: dict[str, list[float]] = {"coatrt": [], "peft": []}
    start = 0.0

    def wait() -> None:
        if compute != "cpu":
            torch.cuda.synchronize()

    def between(step: int) -> None:
        # PEFT runs one step between two of coatrt; its time is excluded.
        nonlocal start
        wait()
        now = time.perf_counter()
        if start:
            seconds["coatrt"].append(now - start)
        peft.step(step)
        wait()
        seconds["peft"].append(time.perf_counter() - now)
        start = time.perf_counter()

    ours.run(steps, between)
    return seconds


def figures(seconds: dict[str, list[float]], skipped: int) -> dict[str, Any]:
    """Return medians and the ratio of both; the first steps, which fill the caches, are skipped."""
    warm = range(skipped, len(seconds["coatrt"]))
    ratios = sorted(seconds["coatrt"][i] / statistics.mean(seconds["peft"][i : i + 2]) for i in warm)
    return {
        "median_s": {name: statistics.median(values[i] for i in warm) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-len(ratios) // 4]],
    }


def main() -> None:
    """Alternate the two and check the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--compute", default="cpu", help="torch device")
    arguments = parser.parse_args()
    steps, compute = arguments.steps, arguments.compute
    checkpoint, tokens = smollm2(), tokens_of(128)
    peft, ours = PeftTraining(checkpoint, tokens, compute), OurTraining(checkpoint, tokens, compute)
    seconds = alternate(peft, ours, steps, compute)
    first = statistics.mean(seconds["coatrt"][: steps // 4])
    result = {"seconds": seconds, **figures(seconds, steps // 4), "first_steps_mean_s": first}
    more = f" --compute {compute}" if compute != "cpu" else ""
    save_result("training_step" + ("_gpu" if more else ""), f"python benchmarks/training_step.py{more}", result)
    if result["ratio"] > LIMIT:
        sys.exit(f"a step costs {result['ratio']:.2f} times PEFT's")


if __name__ == "__main__":
    main()
