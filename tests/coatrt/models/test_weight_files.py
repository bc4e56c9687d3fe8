"""One list of weight files, by transformers' rule; what is odd is refused before anything is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coatrt.errors import CheckpointError
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.modules import load_model
from coatrt.models.weight_files import stored_tensors
from support.tiny import save_tiny_llama

INDEX = "model.safetensors.index.json"


@pytest.fixture
def whole(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "whole"))


@pytest.fixture
def sharded(tiny_llama: Path, tmp_path: Path) -> Path:
    load_model(Checkpoint.open(tiny_llama)).save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    return tmp_path / "sharded"


def _same(directory: Path) -> None:
    """Check that torch, the exporter's reader and transformers see one model."""
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    ours = load_model(checkpoint).state_dict()
    assert ours.keys() == theirs.keys()
    for name in checkpoint.tensors:
        assert torch.equal(ours[name], theirs[name])
        assert torch.equal(checkpoint.tensor(name), theirs[name])


def test_a_stale_index_and_its_shards_are_not_read(whole: Path, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", seed=1)
    load_model(Checkpoint.open(other)).save_pretrained(tmp_path / "old", max_shard_size="50KB")
    for path in (tmp_path / "old").glob("model*"):
        shutil.copy(path, whole)
    assert (whole / INDEX).is_file()
    _same(whole)


def test_pickles_and_other_files_beside_are_not_read(whole: Path, sharded: Path) -> None:
    for directory in (whole, sharded):
        torch.save({"model.norm.weight": torch.zeros(64)}, directory / "pytorch_model.bin")
        save_file({"model.norm.weight": torch.zeros(64)}, directory / "consolidated.safetensors")
        save_file({"model.norm.weight": torch.zeros(64)}, directory / "adapter_model.safetensors")
        _same(directory)


def test_weights_of_another_name_are_refused(whole: Path) -> None:
    (whole / "model.safetensors").rename(whole / "weights.safetensors")
    torch.save({}, whole / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"needs model.safetensors .* it has pytorch_model.bin, weights.safetens"):
        Checkpoint.open(whole)


@pytest.mark.parametrize("how", ["lacks", "another shard", "elsewhere", "twice", "more", "not text"])
def test_an_index_that_is_not_its_shards_is_refused(how: str, sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    names = index["weight_map"]
    first, second = sorted(set(names.values()))[:2]
    shards = list(names.values())
    name = next(name for name in names if shards.count(names[name]) > 1)
    said = f"differ in 1 tensors, like {name}"
    if how == "lacks":
        del names[name]
    elif how == "another shard":
        names[name] = second if names[name] == first else first
    elif how == "elsewhere":
        names[name] = f"../sharded/{first}"
        said = "is outside the directory"
    elif how == "twice":
        tensors = load_file(sharded / second)
        save_file({**tensors, **load_file(sharded / first)}, sharded / second)
        said = "both contain"
    elif how == "more":
        names["model.layers.9.mlp.up_proj.weight"] = first
        said = "differ in 1 tensors, like model.layers.9"
    else:
        names[name] = 3
        said = "is garbled"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=said) as caught:
        stored_tensors(sharded)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool])
def test_tensors_that_are_no_floats_are_refused(dtype: torch.dtype, whole: Path) -> None:
    path = whole / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.up_proj.weight in .*; allowed: F64, F32, F16, BF16"):
        Checkpoint.open(whole)


def test_a_tensor_named_twice_in_a_header_is_refused(whole: Path) -> None:
    path = whole / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    facts = json.dumps(header["model.norm.weight"])
    text = json.dumps(header)[:-1] + f', "model.norm.weight": {facts}}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[8 + length :])
    with pytest.raises(
        CheckpointError, match=r"header of .*model\.safetensors has the key 'model\.norm\.weight' twice"
    ):
        stored_tensors(whole)
