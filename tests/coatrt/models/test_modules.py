"""transformers' modules with exactly the tensors that an export reads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coatrt.errors import CheckpointError
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.exportable import check_tensors
from coatrt.models.modules import empty_model, load_model
from support.families import UNLIKE, save_model


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_what_transformers_loads(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_model(tmp_path, name)
    ids = torch.arange(20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    ours = load_model(Checkpoint.open(tmp_path), dtype)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert {p.dtype for p in ours.parameters()} == {dtype}


def test_no_weight_is_a_view_of_its_file(tiny_llama: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    model = load_model(Checkpoint.open(directory))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with (directory / "model.safetensors").open("r+b") as stream:
        stream.seek(4096)
        stream.write(b"\xff" * 100_000)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_empty_model_takes_no_memory(tiny_llama: Path) -> None:
    model = empty_model(Checkpoint.open(tiny_llama))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rows", r"model.embed_tokens.weight has the shape \[272, 64\], config.json says \[260, 64\]"),
        ("width", r"has the shape \[160, 64\], config.json says \[128, 64\]"),
        ("layers", "9 tensors unused for .*, like model.layers.1"),
        ("more layers", "9 tensors missing for .*, like model.layers.2"),
        ("bias", "8 tensors missing for .*, like model.layers.0.self_attn.k_proj.bias"),
        ("head", "tie_word_embeddings is true and lm_head.weight has other values than model.embed_tokens.weight"),
    ],
)
def test_tensors_that_are_not_the_modules_are_named(change: str, said: str, tiny_llama: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "rows": {"vocab_size": 260},
        "width": {"intermediate_size": 128},
        "layers": {"num_hidden_layers": 1},
        "more layers": {"num_hidden_layers": 3},
        "bias": {"attention_bias": True},
        "head": {},
    }[change]
    (directory / "config.json").write_text(json.dumps(config))
    if change == "head":
        path = directory / "model.safetensors"
        tensors = load_file(path)
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 2}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=said) as caught:
        check_tensors(Checkpoint.open(directory))
    assert "\n" not in str(caught.value)


def test_a_tied_head_of_the_same_values_may_lie_beside(tiny_llama: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    check_tensors(Checkpoint.open(directory))
