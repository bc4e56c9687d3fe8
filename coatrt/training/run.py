"""Training of A, B and θ together on the task loss, with new configurations in every step."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from coatrt.adapter.adapter import Adapter
from coatrt.adapter.compensation import Compensator
from coatrt.adapter.description import AdapterDescription
from coatrt.adapter.features import ConfigEncoder
from coatrt.adapter.lora import CoaLora
from coatrt.configs.lora_contract import LoraContract, contract_for
from coatrt.configs.space import ConfigSpace
from coatrt.data.examples import Examples
from coatrt.data.task_data import TaskData
from coatrt.errors import CheckpointError, ConfigError
from coatrt.evaluation.curvature import measure_sensitivity, output_gains
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.evaluation.sensitivity_table import Sensitivity
from coatrt.export.preflight import preflight
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.spec import DecoderSpec
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.input_moments import Calibration, InputMoments, calibration_examples
from coatrt.quantization.learned_scales import LearnedScales
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.distributed import Processes
from coatrt.system.exclusive import exclusive
from coatrt.system.files import check_replaceable
from coatrt.system.json_data import read_as, write_json
from coatrt.system.progress import Progress, silent
from coatrt.system.resources import compute_device
from coatrt.system.scratch import sweep
from coatrt.training.calibration import SENSITIVITY_BLOCKS, calibration_blocks
from coatrt.training.checkpoint_formats import checkpoint_formats
from coatrt.training.config_sampler import TrainingSampler
from coatrt.training.held_out import measure_budgets
from coatrt.training.loop import optimise
from coatrt.training.options import TrainOptions
from coatrt.training.output import claim_output, read_finished
from coatrt.training.resume_state import History, claim_state, has_state
from coatrt.training.scale_learning import learn_scales, learning_budgets

__all__ = ["train"]

_START_SHARES = {"residual": 1.0, "mixed": 0.5, "random": 0.0}  # of A's columns, see TrainOptions.start


def train(
    source: str | Path,
    data: TaskData,
    output: str | Path,
    options: TrainOptions | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Progress = silent,
) -> Adapter:
    """Train a configuration-aware LoRA on text or another task and save it.

    While it runs, `output`/training has a checkpoint; at the end the finished adapter replaces the directory.

    Args:
        source: the model: Hugging Face directory, hub name or GGUF file. The formats of a quantized checkpoint join
            those of the options, so that its own codes can be planned.
        data: data to train and measure on, from `load_task`.
        output: directory of the adapter.
        options: options of training.
        resume: continue from the last checkpoint; a finished adapter is returned unchanged.
        overwrite: replace a finished adapter, or discard an unfinished training.
        device: torch device, such as "cpu" or "cuda".
        progress: called during calibration, sensitivities, training and measuring, in the first process only.

    Raises:
        ConfigError: options or data do not fit, `output` is in use, or there is no such device.
        CheckpointError: the model cannot be read or exported, or a checkpoint is damaged.
    """
    output = Path(output)
    sweep(output.parent)
    run = _open(source, data, output, options or TrainOptions(), device, progress)
    if resume and not overwrite and (output / "adapter.json").is_file():
        return read_finished(output, run.identity)
    check_replaceable(output)
    with exclusive(output) if run.processes.is_first else nullcontext():
        if run.processes.is_first:
            claim_output(output, run.identity, resume, overwrite)
        run.processes.wait()
        _train(run, output)
        run.processes.wait()
    return Adapter.from_pretrained(output)


@dataclass(frozen=True)
class _Run:
    """The checked inputs of a training."""

    source: str  # hub name or absolute path of the model
    checkpoint: Checkpoint
    spec: DecoderSpec
    space: ConfigSpace
    budgets: tuple[float, float]  # lowest and highest of training, bits per weight
    contract: LoraContract
    data: TaskData
    options: TrainOptions
    state: Path  # directory of checkpoints
    identity: str  # hash of options, model and data
    device: str
    processes: Processes
    progress: Progress  # of the first process

    @cached_property
    def calibration(self) -> Calibration:
        """The tokens for the second moments of quantizer and compensation."""
        return Calibration.of(self._examples(calibration_blocks(self.options, self.checkpoint.matrices)))

    @cached_property
    def sensitivity_examples(self) -> Examples:
        """The examples that sensitivities and A's start are measured on.

        They are others than the quantizer is calibrated on, which it fits: on those, few bits look better than they are
        beside more (`benchmarks/sensitivity_text.py`, docs/evidence/planning.md).
        """
        return self._examples(self.options.calibration or SENSITIVITY_BLOCKS, others=True)

    def _examples(self, blocks: int, others: bool = False) -> Examples:
        options = self.options
        return calibration_examples(self.data.train, blocks, options.max_length, options.seed, others)


def _train(run: _Run, output: Path) -> None:
    """Train, and save the adapter."""
    codes = CodeStore(run.checkpoint, run.options.quantizer, run.calibration, run.progress, run.device)
    run.progress(0, 1, "loading the model")
    model = FakeQuantModel(run.checkpoint, codes, run.device, dtype=getattr(torch, run.options.precision))
    run.progress(1, 1, "loading the model")
    scales = _learn_scales(run, model, codes) if run.options.learn_scales else None
    sensitivity = _measure(run, model, codes, "sensitivity.json")
    sampler = TrainingSampler(run.space, sensitivity.costs, *run.budgets, run.options.seed)
    lora = _start(run, model, sensitivity)
    history = optimise(
        model, lora, run.data.train, sampler.draw, run.options, run.state, run.identity, run.processes, run.progress
    )
    lora.settle(run.progress)
    adapter = _adapter(
        run,
        lora,
        scales,
        sensitivity,
        history,
        measure_budgets(model, lora, sampler, run.data, run.options, run.progress),
    )
    if run.processes.is_first:
        adapter.write(output)


def _open(
    source: str | Path, data: TaskData, output: Path, options: TrainOptions, device: str, progress: Progress
) -> _Run:
    """Open the model and check everything that could fail later."""
    checkpoint = Checkpoint.open(source)
    spec = DecoderSpec.from_config(checkpoint.config)
    data.check_rows(checkpoint.matrices.matrices[0].N)
    own = checkpoint_formats(checkpoint, options)
    formats = dict.fromkeys(map(WeightFormat.parse, (*options.formats, *own.values())))
    space = ConfigSpace(checkpoint.matrices, tuple(formats))
    processes = Processes(compute_device(device).type)
    processes.share(torch.arange(options.batch))  # refuses a batch that is not a multiple of them
    choices = {**asdict(options), "checkpoint_every": None}  # it does not affect the result
    facts = json.dumps([choices, checkpoint.fingerprint, data.digest])
    budgets = _budgets(space, options)
    contract = contract_for(checkpoint.matrices, options.rank, options.alpha, dict(options.ranks))
    preflight(checkpoint, progress)  # the longest check comes last
    return _Run(
        source=str(Path(source).absolute()) if Path(source).exists() else str(source),
        checkpoint=checkpoint,
        spec=spec,
        space=space,
        budgets=budgets,
        contract=contract,
        data=data,
        options=options,
        state=output / "training",
        identity=hashlib.sha256(facts.encode()).hexdigest()[:16],
        device=device,
        processes=processes,
        progress=progress if processes.is_first else silent,
    )


def _budgets(space: ConfigSpace, options: TrainOptions) -> tuple[float, float]:
    """Return the lowest and the highest budget of training, in bits per weight."""
    least, most = space.min_bits, space.max_bits
    low = least if options.low_bits is None else options.low_bits
    high = min(most, max(low, 8.5)) if options.high_bits is None else options.high_bits
    if not least - 1e-9 <= low <= high <= most + 1e-9:
        raise ConfigError(
            f"budgets must be within {least:.3f} to {most:.3f} bits, the range of the formats, got {low:g} to {high:g} "
            "(--low-bits, --high-bits)"
        )
    for bits in options.measured_budgets(least, most):
        if not least <= bits <= most:
            raise ConfigError(
                f"budgets must be within {least:.3f} to {most:.3f} bits, the range of the formats, got {bits:g} "
                "(--budgets)"
            )
    return low, high


def _encode(run: _Run, codes: CodeStore) -> None:
    """Encode every matrix in every format now, all of which is needed later, so that progress is shown."""
    names = run.checkpoint.matrices.names
    for i, name in enumerate(names):
        for fmt in run.space.formats:
            codes.get(name, fmt)
        run.progress(i + 1, len(names), "quantizing")
    codes.release()


def _learn_scales(run: _Run, model: FakeQuantModel, codes: CodeStore) -> LearnedScales:
    """Return the learned scales, which `codes` and `model` use from then on; an interrupted training goes on."""
    first = _measure(run, model, codes, "first_sensitivity.json")
    path = run.state / "scales.safetensors"
    if path.is_file():
        scales = LearnedScales.load(path)
    else:
        budgets, state = learning_budgets(run.space, *run.budgets), run.state / "scales"
        draw = TrainingSampler(run.space, first.costs, *budgets, run.options.seed).draw
        scales = learn_scales(
            model, codes, run.space, run.data.train, draw, run.options, state, run.identity, run.processes, run.progress
        )
        if run.processes.is_first:
            scales.save(path)
            shutil.rmtree(state, ignore_errors=True)
    run.processes.wait()
    codes.use(scales)
    model.forget()
    return scales


def _measure(run: _Run, model: FakeQuantModel, codes: CodeStore, file: str) -> Sensitivity:
    """Return the sensitivities, measured by the first process unless an interrupted training saved them in a file."""
    path = run.state / file
    if run.processes.is_first:
        claim_state(run.state, run.identity)
        if not path.is_file():
            _encode(run, codes)
            sensitivity = measure_sensitivity(model, codes, run.sensitivity_examples, run.space.formats, run.progress)
            if not all(isfinite(cost) for row in sensitivity.costs.values() for cost in row.values()):
                raise CheckpointError(
                    f"the outputs of {run.checkpoint.directory} are not finite; check its norms and biases, or "
                    "download it again"
                )
            write_json(path, sensitivity, sealed=True)
    run.processes.wait()
    return read_as(path, Sensitivity, "sensitivities", "remove the file to measure them again", sealed=True)


def _start(run: _Run, model: FakeQuantModel, sensitivity: Sensitivity) -> CoaLora:
    """Return the initial LoRA; with compensation, A starts with the directions that compensate most."""
    options = run.options
    encoder = ConfigEncoder(run.checkpoint.matrices, run.space.formats, sensitivity.errors)
    lora = CoaLora(run.contract, encoder, options.preset, options.seed)
    lora.to(run.device)
    if not options.compensation:
        return lora
    moments = InputMoments(run.checkpoint, run.calibration, run.progress, run.device)
    compensator = Compensator(model, moments, run.contract, run.progress)
    share = _START_SHARES[options.start]
    if not share or has_state(run.state):
        lora.compensate(compensator)
        return lora
    model.set_config(None)
    model.set_pairs(None)
    gains = output_gains(model, run.sensitivity_examples, run.progress)
    lora.compensate(compensator, gains, share, run.progress)
    run.processes.copy_from_first(lora.parameters())
    return lora


def _adapter(
    run: _Run,
    lora: CoaLora,
    scales: LearnedScales | None,
    sensitivity: Sensitivity,
    history: History,
    held_out: Mapping[str, Any],
) -> Adapter:
    """Return the finished adapter with its metrics."""
    options, data = run.options, run.data
    limit = options.held_out_limit(data.kind)
    description = AdapterDescription(
        source=run.source,
        fingerprint=run.checkpoint.fingerprint,
        spec=run.spec,
        space=run.space,
        contract=run.contract,
        sensitivity=sensitivity,
        metrics={
            "run": run.identity,
            "options": asdict(options),
            "task": data.kind,
            "dropped": data.dropped,
            "train_tokens": data.train.target_count,
            "held_out_examples": min(limit, len(data.held_out)),
            "held_out_tokens": data.held_out[:limit].target_count,
            "seconds": history.seconds,
            "losses": history.losses,
            "held_out": held_out,
        },
        quantizer=options.quantizer,
        checkpoint_formats=checkpoint_formats(run.checkpoint, options),
    )
    return Adapter(description, lora.eval(), run.calibration, scales)
