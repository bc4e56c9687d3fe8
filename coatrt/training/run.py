"""Training: A, B and θ together on the task loss, over configurations drawn anew in every step."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from coatrt.adapter.adapter import Adapter
from coatrt.adapter.compensation import Compensator
from coatrt.adapter.features import ConfigEncoder
from coatrt.adapter.lora import CoaLora
from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import contract_for
from coatrt.configs.space import ConfigSpace
from coatrt.data.task_data import TaskData
from coatrt.data.text import text_task
from coatrt.errors import ConfigError
from coatrt.evaluation.curvature import output_gains
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.losses import measure_held_out
from coatrt.evaluation.sensitivity import measure_sensitivity
from coatrt.evaluation.sensitivity_table import Sensitivity
from coatrt.models.checkpoint import Checkpoint, load_tokenizer
from coatrt.planning.pareto import hypervolume
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.input_moments import Calibration, InputMoments, calibration_examples
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.distributed import Processes
from coatrt.system.files import cache_directory, check_replaceable
from coatrt.system.progress import Progress, silent
from coatrt.system.resources import compute_device
from coatrt.training.config_sampler import TrainingSampler
from coatrt.training.loop import optimise
from coatrt.training.options import DEFAULT_FORMATS, SENSITIVITY_BLOCKS, TrainOptions
from coatrt.training.resume_state import check_state, claim_state, has_state

__all__ = ["DEFAULT_FORMATS", "TrainOptions", "train"]


def train(
    source: str | Path,
    documents: Sequence[str] | TaskData,
    output: str | Path,
    options: TrainOptions | None = None,
    *,
    held_out: Sequence[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    compute: str = "cpu",
    progress: Progress = silent,
) -> Adapter:
    """Train a configuration-aware LoRA on text or another task and save it.

    While it runs, `output`/training holds a checkpoint; when it ends, the finished adapter takes the directory's place.

    Args:
        source: the model: Hugging Face directory, hub name or GGUF file.
        documents: training texts, or the data of a task (`coatrt.data.registry.load_task`).
        output: directory of the adapter.
        options: how to train.
        held_out: texts to measure on; by default every tenth document. A task holds its own.
        resume: go on from the last checkpoint; a finished adapter is returned as it is.
        overwrite: replace a finished adapter or forget an unfinished one.
        compute: torch device.
        progress: called as calibration, sensitivities, training and measuring go on, in the first process only.

    Raises:
        ConfigError: options or data do not fit, `output` is in use, or there is no such device.
        CheckpointError: the model cannot be read, or a checkpoint is damaged.
    """
    output, options = Path(output), options or TrainOptions()
    checkpoint = Checkpoint.open(source)
    run = _identity(options, checkpoint, documents, held_out)
    processes = Processes(compute_device(compute).type)
    processes.share(torch.arange(options.batch))  # refuses a batch that does not divide among them
    if resume and not overwrite and (output / "adapter.json").is_file():
        return _finished(output, run)
    if processes.is_first:
        _claim(output, run, resume, overwrite)
    processes.wait()
    if isinstance(documents, TaskData):
        data = documents
    else:
        data = text_task(load_tokenizer(checkpoint.directory), documents, options.length, held_out=held_out)
    progress = progress if processes.is_first else silent
    training = _Training(checkpoint, str(source), data, options, output / "training", run, compute, processes, progress)
    return training.run(output)


def _claim(output: Path, run: str, resume: bool, overwrite: bool) -> None:
    """Refuse a directory in use, and forget an unfinished training that is not to go on."""
    state = output / "training"
    finished = (output / "adapter.json").is_file()
    check_replaceable(output)
    if finished and not overwrite:
        raise ConfigError(f"{output} holds a finished adapter; give another directory, or --overwrite to replace it")
    if output.is_dir() and any(output.iterdir()) and not (finished or state.is_dir()):
        raise ConfigError(f"{output} holds other files; give another directory")
    if state.is_dir() and not resume and not overwrite:
        raise ConfigError(f"{output} holds an unfinished training; give --resume to go on or --overwrite to start over")
    if overwrite and not resume:
        shutil.rmtree(state, ignore_errors=True)
    check_state(state, run)


def _identity(
    options: TrainOptions,
    checkpoint: Checkpoint,
    documents: Sequence[str] | TaskData,
    held_out: Sequence[str] | None,
) -> str:
    digest = hashlib.sha256(json.dumps([asdict(options), checkpoint.fingerprint]).encode())
    if isinstance(documents, TaskData):
        if held_out is not None:
            raise ConfigError("a task and texts to measure on are given; a task holds its own, leave held_out out")
        digest.update(documents.digest.encode())
        return digest.hexdigest()[:16]
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
    """One run: model, sensitivities, LoRA, and what is measured of them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: str,
        data: TaskData,
        options: TrainOptions,
        state: Path,
        run: str,
        compute: str,
        processes: Processes,
        progress: Progress,
    ) -> None:
        self.processes, self.progress = processes, progress
        self.checkpoint, self.data, self.options, self.state, self.identity = checkpoint, data, options, state, run
        self.source = os.path.abspath(source) if Path(source).exists() else source  # noqa: PTH100 - keeps symbolic links
        formats = tuple(WeightFormat.parse(text) for text in options.formats)
        self.space = ConfigSpace(checkpoint.matrices, formats, options.fused)
        low = self.space.min_bits if options.low_bits is None else options.low_bits
        high = min(self.space.max_bits, max(low, 8.5)) if options.high_bits is None else options.high_bits
        self._check_budgets(low, high)
        contract = contract_for(checkpoint.matrices, options.rank, options.alpha, dict(options.ranks))
        blocks = options.calibration_blocks(checkpoint.matrices)
        self.calibration = Calibration.of(calibration_examples(data.train, blocks, options.length, options.seed))
        blocks = options.calibration or SENSITIVITY_BLOCKS
        self.calibrated_on = calibration_examples(data.train, blocks, options.length, options.seed)
        self.codes = CodeStore.default(checkpoint, options.quantizer, self.calibration, progress)
        self.model = FakeQuantModel(checkpoint, self.codes, compute, dtype=getattr(torch, options.precision))
        self.sensitivity = self._sensitivity()
        self.sampler = TrainingSampler(self.space, self.sensitivity.costs, low, high, options.planned, options.seed)
        encoder = ConfigEncoder(checkpoint.matrices, formats, self.sensitivity.errors)
        self.lora = CoaLora(contract, encoder, options.preset, options.seed)
        self.lora.to(compute)
        if options.compensation:
            self._compensate()
        self.full_precision: float | None = None

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
        if self.processes.is_first:
            claim_state(self.state, self.identity)
        if self.processes.is_first and not path.is_file():
            measured = measure_sensitivity(
                self.model, self.codes, self.calibrated_on, self.space.formats, self.progress
            )
            measured.save(path)
        self.processes.wait()
        return Sensitivity.load(path)

    def _compensate(self) -> None:
        """Let C make up for quantization and, where training begins, A start from what it can make up for most."""
        moments = InputMoments(self.checkpoint, self.calibration, cache_directory() / "moments", progress=self.progress)
        compensator = Compensator(self.model, moments, self.lora.contract, self.progress)
        share = {"residual": 1.0, "mixed": 0.5, "random": 0.0}[self.options.start]
        if not share or has_state(self.state):
            self.lora.compensate(compensator)
            return
        self.model.set_config(None)
        self.model.set_pairs(None)
        gains = output_gains(self.model, self.calibrated_on, self.progress)
        self.lora.compensate(compensator, gains, share, self.progress)
        self.processes.copy_from_first(self.lora.parameters())

    def run(self, output: Path) -> Adapter:
        options, train = self.options, self.data.train
        measure = self._hypervolume if options.evaluate_every and options.budgets else None
        history = optimise(
            self.model,
            self.lora,
            train,
            lambda step: self.sampler.draw(step, options.configs),
            options,
            self.state,
            self.identity,
            self.processes,
            measure,
            self.progress,
        )
        self.lora.settle()
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
                "task": self.data.kind,
                "dropped": self.data.dropped,
                "train_tokens": train.predicted,
                "held_out_examples": min(options.evaluation, len(self.data.held_out)),
                "held_out_tokens": self.data.held_out[: options.evaluation].predicted,
                "seconds": history.seconds,
                "losses": history.losses,
                "hypervolumes": history.measured,
                "held_out": self._evaluate(),
            },
            quantizer=options.quantizer,
            calibration=self.calibration,
        )
        if self.processes.is_first:
            adapter.save(output)
        self.processes.wait()
        return Adapter.load(output)

    @torch.no_grad()
    def _measure(self, config: QuantConfig | None, adapted: bool) -> dict[str, float]:
        """Return held-out numbers of a configuration (None: full precision), with its LoRA or without."""
        self.model.set_config(config)
        self.model.set_pairs(self.lora.pairs(config) if adapted and config is not None else None)
        return measure_held_out(self.model, self.data, self.options.evaluation)

    def _hypervolume(self) -> float:
        """Return the hypervolume of (bits, held-out loss) over the budgets.

        The reference point is the space's most bits and the loss of the full-precision model plus one nat.
        """
        if self.full_precision is None:
            self.full_precision = self._measure(None, adapted=False)["loss"]
        configs = [self.sampler.plan_like(None, bits) for bits in self.options.budgets]
        points = [
            (config.average_bits(self.space.model), self._measure(config, adapted=True)["loss"]) for config in configs
        ]
        return hypervolume(points, (self.space.max_bits, self.full_precision + 1))

    def _evaluate(self) -> dict[str, Any]:
        """Return held-out losses: full precision, and per budget the allocated configuration without and with LoRA.

        Where the task has an accuracy, it stands beside each loss, its key ending in "_accuracy".
        """
        rows, done, total = [], 0, 1 + 2 * len(self.options.budgets)

        def measure(name: str, config: QuantConfig | None, adapted: bool) -> dict[str, float]:
            nonlocal done
            found = self._measure(config, adapted)
            done += 1
            self.progress(done, total, "held-out loss")
            return {name if key == "loss" else f"{name}_{key}": value for key, value in found.items()}

        base = measure("full_precision", None, False)
        for bits in self.options.budgets:
            config = self.sampler.plan_like(None, bits)
            bits = config.average_bits(self.space.model)
            without, adapted = measure("without", config, False), measure("adapted", config, True)
            rows.append({"bits": bits, "configuration": config.hash, **without, **adapted})
        return {**base, "budgets": rows}
