"""What an export refuses is refused before training; what it takes is not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coatrt.errors import CheckpointError, CoatError
from coatrt.training.run import train
from support.tiny import TEXTS, save_tiny_llama, text_data, tiny_options


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


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("layers", "says 100000 layers, the files hold 20 tensors"),
        ("norm", "model.norm.weight has values that are not finite"),
        ("matrix", "model.layers.1.mlp.up_proj.weight has values that are not finite"),
        ("generation settings", r"generation_config.json .*is garbled"),
        ("end token", r"eos_token_id must be a token id or a list of them, got 'x'"),
    ],
)
def test_what_is_wrong_in_a_model_is_named_before_training(what: str, said: str, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    if what == "layers":  # transformers would make them all
        (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 100_000}))
    elif what == "generation settings":
        (model / "generation_config.json").write_text("[]")
    elif what == "end token":
        (model / "generation_config.json").write_text('{"eos_token_id": "x"}')
    else:
        path = model / "model.safetensors"
        weights = load_file(path)
        name = {"norm": "model.norm.weight", "matrix": "model.layers.1.mlp.up_proj.weight"}[what]
        weights[name].view(-1)[0] = torch.nan
        save_file(weights, path, metadata={"format": "pt"})
    data = text_data(save_tiny_llama(tmp_path / "plain"), TEXTS)
    with pytest.raises(CoatError, match=said) as caught:
        train(model, data, tmp_path / "adapter", tiny_options())
    assert "\n" not in str(caught.value)
