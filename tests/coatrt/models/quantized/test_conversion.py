"""The conversion of a quantized checkpoint: once, checked against its source, with nothing left over."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coatrt.errors import CheckpointError
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.quantized.conversion import check_quantized, convert_quantized
from support.quantized import write_methods


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("methods")
    write_methods(where)
    return where


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "modelopt"])
def test_a_conversion_is_made_once_and_equals_its_source(written: Path, method: str) -> None:
    made = convert_quantized(written / method)
    stamps = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert convert_quantized(written / method) == made
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == stamps
    check_quantized(written / method, made)
    checkpoint = Checkpoint.open(written / method)
    assert checkpoint.codes is not None
    assert len(checkpoint.codes.formats) + len(checkpoint.codes.decoded) == 7
    assert (made / "tokenizer.json").is_file()
    for name in ("model-00001.safetensors", "codes-00001.safetensors"):
        tensors = load_file(made / name)
        key = next(key for key in sorted(tensors) if "q_proj" in key)
        tensors[key] = tensors[key].clone()
        tensors[key].view(torch.uint8)[0, 0] ^= 1
        save_file(tensors, made / name, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"q_proj differs from"):
            check_quantized(written / method, made)
        convert_quantized(written / method)  # the hashes differ, so it is made again
        check_quantized(written / method, made)


def test_tensors_that_the_method_does_not_explain_are_refused(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "gptq", tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj"
    save_file({**tensors, f"{name}.perm": torch.zeros(4, dtype=torch.int32)}, file)
    with pytest.raises(CheckpointError, match=r"up_proj.perm as I32, which GPTQ does not explain"):
        Checkpoint.open(tmp_path / "m")
    save_file({**tensors, f"{name}.weight": torch.zeros(256, 128)}, file)
    with pytest.raises(CheckpointError, match=r"up_proj twice, quantized and plain"):
        Checkpoint.open(tmp_path / "m")
    without = {key: value for key, value in tensors.items() if key != f"{name}.scales"}
    save_file(without, file)
    with pytest.raises(CheckpointError, match=r"has no tensor .*up_proj.scales"):
        Checkpoint.open(tmp_path / "m")
    save_file({**tensors, f"{name}.scales": tensors[f"{name}.scales"] * torch.inf}, file)
    with pytest.raises(CheckpointError, match=r"up_proj has scales or values that are not finite"):
        Checkpoint.open(tmp_path / "m")
