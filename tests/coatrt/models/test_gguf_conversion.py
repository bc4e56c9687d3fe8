"""A GGUF file is converted once; a conversion that was altered is made again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from coatrt.errors import CheckpointError
from coatrt.models import conversion, gguf_conversion
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.gguf_conversion import convert_gguf
from coatrt.models.modules import load_model
from support.families import save_model
from support.gguf_files import write_gguf

pytest.importorskip("gguf", reason="needs the gguf extra")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path / "cache"))
    model = save_model(tmp_path / "source", "llama", vocab_size=272, eos_token_id=256)
    return write_gguf(tmp_path / "m.gguf", model)


def test_any_flipped_byte_of_a_conversion_makes_it_again(file: Path) -> None:
    made = convert_gguf(file)
    contents = {path.name: path.read_bytes() for path in made.iterdir()}
    rng = np.random.default_rng(0)
    for name, content in contents.items():
        if not content:
            continue
        damaged = bytearray(content)
        damaged[int(rng.integers(len(damaged)))] ^= 1
        (made / name).write_bytes(damaged)
        assert convert_gguf(file) == made
        assert {path.name: path.read_bytes() for path in made.iterdir()} == contents, name
    (made / "model-00002.safetensors").write_bytes(b"")  # a file that was not there
    convert_gguf(file)
    assert {path.name for path in made.iterdir()} == set(contents)


def test_a_conversion_is_compared_with_its_file(file: Path) -> None:
    made = convert_gguf(file)
    gguf_conversion.check_conversion(file, made)
    shard = next(made.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors["model.norm.weight"] *= 1.001
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=r"model.norm.weight differs from .*m.gguf"):
        gguf_conversion.check_conversion(file, made)


def test_a_large_model_is_written_in_shards(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_model(Checkpoint.open(file)).state_dict()
    monkeypatch.setattr(conversion, "_VERSION", -1)  # converted anew
    monkeypatch.setattr(conversion, "_SHARD", 40_000)
    checkpoint = Checkpoint.open(file)
    sizes = [path.stat().st_size for path in checkpoint.directory.glob("*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) < 60_000
    sharded = load_model(checkpoint).state_dict()
    assert all(torch.equal(sharded[name], value) for name, value in whole.items())
