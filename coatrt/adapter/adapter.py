"""The adapter: everything training leaves behind, as JSON and safetensors in one directory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from coatrt import __version__
from coatrt.adapter.description import ADAPTER_FORMAT, adapter_hash, adapter_reading, read_description
from coatrt.adapter.features import ConfigEncoder
from coatrt.adapter.lora import CoaLora
from coatrt.adapter.peft_format import write_peft
from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import LoraContract
from coatrt.configs.space import ConfigSpace
from coatrt.errors import CheckpointError, ConfigError
from coatrt.evaluation.sensitivity_table import Sensitivity
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.matrices import ModelMatrices
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.input_moments import Calibration
from coatrt.quantization.quantizers import CALIBRATED, QUANTIZERS, Quantizer
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.files import atomic_directory, read_json, sha256_file, write_json
from coatrt.system.progress import Progress, silent

__all__ = ["ADAPTER_FORMAT", "Adapter"]

_FILES = ("adapter.safetensors", "sensitivity.json", "metrics.json")
_CALIBRATION = "calibration.safetensors"
_OWN = ("adapter.json", *_FILES, _CALIBRATION, "peft", "training", "archive.json")


@dataclass(frozen=True)
class Adapter:
    """A trained configuration-aware LoRA.

    Args:
        source: path or hub name of the model it was trained on.
        fingerprint: of that model's checkpoint.
        model_config: content of its config.json.
        space: its matrices and the formats it was trained for.
        lora: A, B, θ and the table of C.
        sensitivity: costs and errors of every matrix in every format.
        metrics: options and losses of the training.
        quantizer: how the weights it was trained on were encoded; every bundle of it uses the same.
        calibration: the tokens of sensitivities and second moments; None only where the quantizer needs none.
        hash: stands for every file of a saved adapter; empty for one that was never saved.

    Raises:
        ConfigError: the quantizer is unknown or lacks its calibration.
    """

    source: str
    fingerprint: str
    model_config: Mapping[str, Any]
    space: ConfigSpace
    lora: CoaLora
    sensitivity: Sensitivity
    metrics: Mapping[str, Any]
    quantizer: Quantizer = "mse"
    calibration: Calibration | None = None
    hash: str = ""

    def __post_init__(self) -> None:
        if self.quantizer not in QUANTIZERS:
            raise ConfigError(f"no quantizer {self.quantizer!r}; allowed: {', '.join(QUANTIZERS)}")
        if self.quantizer in CALIBRATED and self.calibration is None:
            raise ConfigError(f"the quantizer {self.quantizer} is given without calibration tokens; give some")

    @property
    def model(self) -> ModelMatrices:
        """The matrices of the model."""
        return self.space.model

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        """The formats the adapter was trained for; the hypernetwork's input counts in this order."""
        return self.space.formats

    @property
    def contract(self) -> LoraContract:
        """Names, shapes, rank and scale of its LoRA tensors."""
        return self.lora.contract

    @property
    def encoder(self) -> ConfigEncoder:
        """Tables of the hypernetwork's inputs."""
        return self.lora.encoder

    def emit(self, config: QuantConfig) -> dict[str, Tensor]:
        """Return the LoRA of a configuration: every tensor of the contract, float32.

        Raises:
            ConfigError: the configuration uses a format the adapter was not trained for.
        """
        return self.lora.emit(self.encoder.format_ids(config))

    def checkpoint(self, source: str | Path | None = None) -> Checkpoint:
        """Open the model the adapter belongs to.

        Args:
            source: where it is now; by default where it was at training.

        Raises:
            CheckpointError: it is not there, or it is another model.
        """
        checkpoint = Checkpoint.open(source if source is not None else self.source)
        if checkpoint.fingerprint != self.fingerprint:
            raise CheckpointError(
                f"{source or self.source} has the fingerprint {checkpoint.fingerprint}, the adapter was trained on "
                f"{self.fingerprint}; give the model it was trained on (--model)"
            )
        return checkpoint

    def codes(self, checkpoint: Checkpoint, progress: Progress = silent) -> CodeStore:
        """Return the encoded matrices the adapter was trained on, from the user's cache or encoded as then.

        Args:
            checkpoint: its model, see `checkpoint`.
            progress: called while second moments are measured.
        """
        return CodeStore.default(checkpoint, self.quantizer, self.calibration, progress)

    def save(self, directory: str | Path) -> None:
        """Write the adapter to `directory`, atomically; A and B also for PEFT, without θ and C, in folder peft.

        It takes the place of an adapter or an unfinished training there, archive included; other files stay.
        """
        with atomic_directory(directory, _OWN) as temporary:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.lora.state_dict().items()}
            save_file(state, str(temporary / "adapter.safetensors"))
            self.sensitivity.save(temporary / "sensitivity.json")
            write_json(temporary / "metrics.json", self.metrics)
            if self.calibration is not None:
                self.calibration.save(temporary / _CALIBRATION)
            files = [*_FILES, *([_CALIBRATION] if self.calibration is not None else [])]
            write_peft(temporary / "peft", self.lora.shared(), self.contract, self.source)
            write_json(
                temporary / "adapter.json",
                {
                    "format": ADAPTER_FORMAT,
                    "coatrt": __version__,
                    "source": self.source,
                    "fingerprint": self.fingerprint,
                    "model_config": dict(self.model_config),
                    "model": self.model.to_json(),
                    "formats": [str(fmt) for fmt in self.formats],
                    "fused": self.space.fused,
                    "preset": self.lora.preset,
                    "compensated": self.lora.compensated,
                    "contract": self.contract.to_json(),
                    "quantizer": self.quantizer,
                    "sha256": {name: sha256_file(temporary / name) for name in files},
                },
            )

    @classmethod
    def load(cls, directory: str | Path) -> "Adapter":
        """Read an adapter; every file's hash is checked before it is parsed.

        Raises:
            CheckpointError: it is missing, unfinished, damaged, or of another format.
        """
        directory = Path(directory)
        facts = read_description(directory)
        calibrated = _CALIBRATION in facts["sha256"]
        names = [*_FILES, *([_CALIBRATION] if calibrated else [])]
        with adapter_reading(directory, facts, names) as space:
            sensitivity = Sensitivity.load(directory / "sensitivity.json")
            lora = CoaLora(
                LoraContract.from_json(facts["contract"]),
                ConfigEncoder(space.model, space.formats, sensitivity.errors),
                facts["preset"],
                compensated=bool(facts["compensated"]),
            )
            lora.load_state_dict(load_file(str(directory / "adapter.safetensors")))
            return cls(
                source=str(facts["source"]),
                fingerprint=str(facts["fingerprint"]),
                model_config=facts["model_config"],
                space=space,
                lora=lora.eval().requires_grad_(False),
                sensitivity=sensitivity,
                metrics=read_json(directory / "metrics.json", "training metrics"),
                quantizer=facts["quantizer"],
                calibration=Calibration.load(directory / _CALIBRATION) if calibrated else None,
                hash=adapter_hash(directory),
            )
