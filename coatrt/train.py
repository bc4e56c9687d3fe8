"""Training: A, B and θ together on the task loss, over configurations drawn anew in every step."""

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from coatrt.adapter import Adapter
from coatrt.calibration import Calibration
from coatrt.checkpoint import Checkpoint, load_tokenizer
from coatrt.contract import contract_for
from coatrt.data import TextData, batches, tokenize_text
from coatrt.errors import CoatError, ConfigError
from coatrt.evaluate import mean_loss
from coatrt.fakequant import FakeQuantModel
from coatrt.features import ConfigEncoder
from coatrt.formats import WeightFormat
from coatrt.hypernet import Preset
from coatrt.lora import CoaLora
from coatrt.progress import progress_bar, stages
from coatrt.quantize import QUANTIZERS, Quantizer
from coatrt.sampling import TrainingSampler
from coatrt.sensitivity import Sensitivity, measure_sensitivity
from coatrt.space import ConfigSpace
from coatrt.store import CodeStore
from coatrt.train_state import load_state, save_state

__all__ = ["DEFAULT_FORMATS", "TrainOptions", "train"]

DEFAULT_FORMATS = ("nf3-g64", "nf4-g64", "int4-g64", "nvfp4", "fp8", "int8", "fp16")
"""Some format for every device, from 3.25 bits up."""


@dataclass(frozen=True)
class TrainOptions:
    """How an adapter is trained.

    Args:
        formats: formats a configuration may use, as text.
        rank: LoRA rank, a multiple of 16.
        alpha: LoRA scale numerator.
        preset: form of the hypernetwork, "coatrt" or "paper".
        quantizer: how weights are encoded, see `coatrt.quantize.encode`; "absmax" is the paper's.
        fused: whether q/k/v and gate/up share a format.
        steps: optimizer steps.
        batch: blocks per configuration and step.
        length: tokens per block.
        configs: configurations per step, at least 2 (their gradients are averaged).
        low_bits: lowest budget trained for; None: the least the formats allow.
        high_bits: highest budget; None: the most the formats allow, at most 8.5.
        planned: share of planner-like configurations, see `TrainingSampler`.
        learning_rate: peak rate of A and B.
        theta_rate: peak rate of θ.
        warmup: share of the steps in which the rates rise; then they fall along a cosine to zero.
        clip: largest norm of the gradient.
        calibration: blocks for the sensitivities and for the second moments of "weighted" and "feedback".
        evaluation: held-out blocks for the losses in metrics.json.
        budgets: average bits at which the held-out loss is measured after training.
        checkpoint_every: steps between checkpoints.
        seed: of start values, batches and configurations.

    Raises:
        ConfigError: a value out of range.
        FormatError: an unknown format.
    """

    formats: tuple[str, ...] = DEFAULT_FORMATS
    rank: int = 16
    alpha: float = 32.0
    preset: Preset = "coatrt"
    quantizer: Quantizer = "mse"
    fused: bool = True
    steps: int = 300
    batch: int = 4
    length: int = 256
    configs: int = 2
    low_bits: float | None = None
    high_bits: float | None = None
    planned: float = 0.75
    learning_rate: float = 1e-3
    theta_rate: float = 1e-3
    warmup: float = 0.1
    clip: float = 1.0
    calibration: int = 16
    evaluation: int = 16
    budgets: tuple[float, ...] = (4.0, 5.0, 6.0)
    checkpoint_every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        for text in self.formats:
            WeightFormat.parse(text)
        if self.quantizer not in QUANTIZERS:
            raise ConfigError(f"no quantizer {self.quantizer!r}; allowed: {', '.join(QUANTIZERS)}")
        least = {"steps": 1, "batch": 1, "length": 2, "configs": 2, "calibration": 1, "evaluation": 1,
                 "checkpoint_every": 1}  # fmt: skip
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"{name} {getattr(self, name)} is given; give at least {minimum}")
        for name in ("learning_rate", "theta_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} {getattr(self, name)} is given; give a positive number")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup {self.warmup} is given; give a share of the steps, 0 to 1")

    def rate(self, step: int) -> float:
        """Return the share of the peak learning rate at a step."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))


def train(
    source: str | Path,
    documents: Sequence[str],
    output: str | Path,
    options: TrainOptions | None = None,
    *,
    held_out: Sequence[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    compute: str = "cpu",
) -> Adapter:
    """Train a configuration-aware LoRA on text and save it.

    While it runs, `output`/training holds a checkpoint; when it ends, the finished adapter takes the directory's place.

    Args:
        source: the model: Hugging Face directory, hub name or GGUF file.
        documents: training texts.
        output: directory of the adapter.
        options: how to train.
        held_out: texts to measure on; by default every tenth document.
        resume: go on from the last checkpoint; a finished adapter is returned as it is.
        overwrite: replace a finished adapter or forget an unfinished one.
        compute: torch device.

    Raises:
        ConfigError: options or data do not fit, or `output` is in use.
        CheckpointError: the model cannot be read, or a checkpoint is damaged.
    """
    output, options = Path(output), options or TrainOptions()
    checkpoint = Checkpoint.open(source)
    run = _identity(options, checkpoint, documents, held_out)
    if (output / "adapter.json").is_file() and not overwrite:
        if resume:
            return _finished(output, run)
        raise ConfigError(f"{output} holds a finished adapter; give another directory, or --overwrite to replace it")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; give a directory for the adapter")
    if output.is_dir() and any(output.iterdir()) and not (output / "training").is_dir() and not overwrite:
        raise ConfigError(f"{output} holds other files; give another directory, or --overwrite to replace it")
    state = output / "training"
    if state.is_dir() and not resume and not overwrite:
        raise ConfigError(f"{output} holds an unfinished training; give --resume to go on or --overwrite to start over")
    if overwrite and not resume:
        for name in ("state.json", "sensitivity.json"):
            (state / name).unlink(missing_ok=True)
    data = tokenize_text(load_tokenizer(checkpoint.directory), documents, options.length, held_out=held_out)
    return _Training(checkpoint, str(source), data, options, state, run, compute).run(output)


def _identity(
    options: TrainOptions, checkpoint: Checkpoint, documents: Sequence[str], held_out: Sequence[str] | None
) -> str:
    digest = hashlib.sha256(json.dumps([asdict(options), checkpoint.fingerprint]).encode())
    for text in (*documents, "\0", *(held_out or ())):
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]


def _finished(output: Path, run: str) -> Adapter:
    adapter = Adapter.load(output)
    if adapter.metrics.get("run") != run:
        raise ConfigError(
            f"{output} holds a finished adapter of other options, another model or other data; give another directory, "
            "or --overwrite to replace it"
        )
    return adapter


class _Training:
    """One run: model, sensitivities, LoRA, optimizer."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: str,
        data: TextData,
        options: TrainOptions,
        state: Path,
        run: str,
        compute: str,
    ) -> None:
        self.checkpoint, self.data, self.options, self.state, self.identity = checkpoint, data, options, state, run
        self.source = os.path.abspath(source) if Path(source).exists() else source  # noqa: PTH100 - keeps symbolic links
        formats = tuple(WeightFormat.parse(text) for text in options.formats)
        self.space = ConfigSpace(checkpoint.matrices, formats, options.fused)
        low = self.space.min_bits if options.low_bits is None else options.low_bits
        high = min(self.space.max_bits, max(low, 8.5)) if options.high_bits is None else options.high_bits
        self._check_budgets(low, high)
        contract = contract_for(checkpoint.matrices, options.rank, options.alpha)
        rows = batches(len(data.train), min(options.calibration, len(data.train)), 0, options.seed)
        self.calibration = Calibration(data.train[rows])
        self.codes = CodeStore.default(checkpoint, options.quantizer, self.calibration)
        self.model = FakeQuantModel(checkpoint, self.codes, compute)
        self.started = time.monotonic()
        self.sensitivity = self._sensitivity()
        self.sampler = TrainingSampler(self.space, self.sensitivity.costs, low, high, options.planned, options.seed)
        encoder = ConfigEncoder(checkpoint.matrices, formats, self.sensitivity.errors)
        self.lora = CoaLora(contract, encoder, options.preset, options.seed).to(compute)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [*self.lora.A, *self.lora.B], "lr": options.learning_rate, "peak": options.learning_rate},
                {"params": list(self.lora.theta.parameters()), "lr": options.theta_rate, "peak": options.theta_rate},
            ],
            weight_decay=0.0,
        )

    def _check_budgets(self, low: float, high: float) -> None:
        uniform = dict.fromkeys(map(str, self.space.formats), 0.0)
        TrainingSampler(self.space, dict.fromkeys(self.space.model.names, uniform), low, high, self.options.planned)
        for bits in self.options.budgets:
            if not self.space.min_bits <= bits <= self.space.max_bits:
                raise ConfigError(
                    f"an evaluation budget of {bits:g} bits is given; the formats allow {self.space.min_bits:.3f} to "
                    f"{self.space.max_bits:.3f}; choose budgets inside"
                )

    def _sensitivity(self) -> Sensitivity:
        path = self.state / "sensitivity.json"
        if path.is_file():
            return Sensitivity.load(path)
        with stages("sensitivity") as progress:
            measured = measure_sensitivity(
                self.model, self.codes, self.calibration.tokens, self.space.formats, progress
            )
        measured.save(path)
        return measured

    def run(self, output: Path) -> Adapter:
        done = load_state(self.state, self.lora, self.optimizer, self.identity)
        first = int(done["step"]) if done else 0
        losses: list[list[float]] = done["losses"] if done else []
        before = float(done["seconds"]) if done else 0.0
        options = self.options
        with progress_bar("training", options.steps, first) as bar:
            for step in range(first, options.steps):
                losses.append(self._step(step))
                bar.update(1)
                bar.set_postfix_str(f"loss {sum(losses[-1]) / len(losses[-1]):.3f}")
                if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
                    seconds = before + time.monotonic() - self.started
                    facts = {"step": step + 1, "losses": losses, "seconds": seconds}
                    save_state(self.state, self.lora, self.optimizer, self.identity, facts)
        adapter = Adapter(
            source=self.source,
            fingerprint=self.checkpoint.fingerprint,
            model_config=self.checkpoint.config,
            space=self.space,
            lora=self.lora.eval(),
            sensitivity=self.sensitivity,
            metrics={
                "run": self.identity,
                "options": asdict(options),
                "train_tokens": self.data.train.numel(),
                "held_out_tokens": min(options.evaluation, len(self.data.held_out)) * options.length,
                "seconds": before + time.monotonic() - self.started,
                "losses": losses,
                "held_out": self._evaluate(),
            },
            quantizer=self.options.quantizer,
            calibration=self.calibration,
        )
        adapter.save(output)
        return Adapter.load(output)

    def _step(self, step: int) -> list[float]:
        """Do one optimizer step and return the loss under each of its configurations."""
        options, losses = self.options, []
        tokens = self.data.train[batches(len(self.data.train), options.batch, step, options.seed)]
        configs = self.sampler.draw(step, options.configs)
        for config in configs:
            self.model.set_config(config)
            self.model.set_pairs(self.lora(self.lora.encoder.format_ids(config)))
            loss = self.model.loss(tokens)
            (loss / len(configs)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
        if not all(map(math.isfinite, losses)):
            raise CoatError(
                f"the loss is not finite at step {step + 1}; give a lower learning rate or a higher --low-bits"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * options.rate(step)
        torch.nn.utils.clip_grad_norm_(self.lora.parameters(), options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses

    @torch.no_grad()
    def _evaluate(self) -> dict[str, Any]:
        """Return held-out losses: full precision, and per budget the allocated configuration without and with LoRA."""
        blocks = self.data.held_out[: self.options.evaluation]
        rows = []
        with progress_bar("held-out loss", 1 + 2 * len(self.options.budgets)) as bar:
            self.model.set_config(None)
            self.model.set_pairs(None)
            base = mean_loss(self.model, blocks)
            bar.update(1)
            for bits in self.options.budgets:
                config = self.sampler.plan_like(None, bits)
                self.model.set_config(config)
                self.model.set_pairs(None)
                without = mean_loss(self.model, blocks)
                bar.update(1)
                self.model.set_pairs(self.lora(self.lora.encoder.format_ids(config)))
                adapted = mean_loss(self.model, blocks)
                bar.update(1)
                bits = config.average_bits(self.space.model)
                rows.append({"bits": bits, "configuration": config.hash, "without": without, "adapted": adapted})
        return {"full_precision": base, "budgets": rows}
