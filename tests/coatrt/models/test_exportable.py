"""What an export refuses is refused before training; what it takes is not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coatrt.errors import CheckpointError
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.exportable import check_exportable
from coatrt.models.spec import DecoderSpec
from coatrt.training.run import train
from support.families import MODELS, save_model
from support.tiny import TEXTS, save_tiny_llama, text_data, tiny_options


@pytest.mark.parametrize("name", MODELS)
def test_every_family_passes(name: str, tmp_path: Path) -> None:
    save_model(tmp_path, name)
    checkpoint = Checkpoint.open(tmp_path)
    check_exportable(checkpoint, DecoderSpec.from_config(checkpoint.config))


@pytest.mark.parametrize("wrong", ["value head", "heads"])
def test_training_refuses_what_cannot_be_exported_and_writes_nothing(wrong: str, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", **({"hidden_size": 80} if wrong == "heads" else {}))
    if wrong == "value head":
        path = model / "model.safetensors"
        save_file({**load_file(path), "v_head.summary.weight": torch.zeros(1, 64)}, path, metadata={"format": "pt"})
    said = {"value head": r"1 tensors .* like v_head.summary.weight", "heads": "heads of 20 dimensions"}[wrong]
    with pytest.raises(CheckpointError, match=said):
        train(model, text_data(model, TEXTS), tmp_path / "adapter", tiny_options())
    assert not (tmp_path / "adapter").exists()
