"""Tensor files: every dtype back as it was, and no damage passes."""

from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coatrt.system.tensors import hash_tensors, read_tensors, write_tensors

TENSORS = {
    "a": torch.arange(12, dtype=torch.int64).view(3, 4),
    "b": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn),
    "c": torch.randn(3, generator=torch.Generator().manual_seed(1)).bfloat16(),
}


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    path = tmp_path / "x" / "file.safetensors"
    assert read_tensors(path) is None
    write_tensors(path, {**TENSORS, "t": TENSORS["a"].t()}, {"key": "value"})
    found = read_tensors(path)
    assert found is not None
    tensors, metadata = found
    assert metadata["key"] == "value"
    assert metadata["sha256"] != hash_tensors(tensors), "it covers the metadata too"
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8))
    assert torch.equal(tensors["t"], TENSORS["a"].t())


def test_altered_metadata_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS, {"constant": "0x1.0p+0"})
    data = path.read_bytes()
    for old, new in ((b"0x1.0p+0", b"0x1.0p+1"), (b'"constant"', b'"constans"')):
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, new))
        assert read_tensors(path) is None
    path.write_bytes(data)
    assert read_tensors(path) is not None


def test_the_hash_sees_names_dtypes_shapes_and_values() -> None:
    a = TENSORS["a"]
    others = [{"b": a}, {"a": a.int()}, {"a": a.view(4, 3)}, {"a": a + 1}, {"a": a, "b": a}, {}]
    assert len({hash_tensors(tensors) for tensors in [{"a": a}, *others]}) == 7


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 0.999), bit=st.integers(0, 7), cut=st.booleans())
def test_no_damage_passes(tmp_path: Path, place: float, bit: int, cut: bool) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS)
    data = bytearray(path.read_bytes())
    at = int(place * len(data))
    if cut:
        data = data[:at]
    else:
        data[at] ^= 1 << bit
    path.write_bytes(bytes(data))
    found = read_tensors(path)
    if found is not None:  # only where what changed means nothing, as between the header's entries
        assert hash_tensors(found[0]) == hash_tensors(TENSORS)
