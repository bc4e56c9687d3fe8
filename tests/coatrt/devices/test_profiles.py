"""Device profiles as data, and the probe against a fake driver."""

import os
from pathlib import Path

import pytest

from coatrt.devices.probe import probe
from coatrt.devices.profiles import device_profile, device_profiles, min_sm
from coatrt.errors import DeviceError
from coatrt.quantization.weight_format import WeightFormat

pytestmark = pytest.mark.fast

RTX_TARGETS = {75, 80, 86, 89, 120, 121}


def test_there_are_enough_devices_with_sane_figures_and_sources() -> None:
    gpus = [profile for profile in device_profiles() if profile.id != "cpu"]
    assert len(gpus) >= 20
    assert len({profile.id for profile in device_profiles()}) == len(device_profiles())
    assert {profile.sm for profile in gpus} == {75, 80, 86, 87, 89, 90, 100, 110, 120, 121}
    for profile in gpus:
        assert profile.memory_bytes is not None
        assert profile.bandwidth is not None
        assert profile.fp16_flops is not None
        assert 4e9 < profile.memory_bytes < 300e9
        assert 50e9 < profile.bandwidth <= 8e12
        assert 10e12 < profile.fp16_flops < 3e15
        # No GPU multiplies less than 60 or more than 700 fp16 numbers a byte: catches a wrong power of ten.
        assert 50 < profile.fp16_flops / profile.bandwidth < 1000
        assert profile.sources
        assert all(len(source) > 15 for source in profile.sources)
        assert profile.builder == ("tensorrt-rtx" if profile.sm in RTX_TARGETS else "tensorrt")


def test_known_figures() -> None:
    four, five = device_profile("rtx-4090"), device_profile("rtx-5090")
    assert (four.sm, four.memory_bytes, four.bandwidth) == (89, 24 << 30, 1008e9)
    assert (five.sm, five.memory_bytes, five.bandwidth) == (120, 32 << 30, 1792e9)
    assert device_profile("rtx-4050-laptop").memory_bytes == 6 << 30


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("fp16", 75),
        ("int8-g64", 75),
        ("nf3-g64-dq4-bf16-256", 75),
        ("bf16", 80),
        ("int4-g64", 80),
        ("fp8", 89),
        ("nvfp4", 100),
    ],
)
def test_formats_follow_the_compute_capability(text: str, first: int) -> None:
    fmt = WeightFormat.parse(text)
    assert min_sm(fmt) == first
    for profile in device_profiles():
        assert profile.supports(fmt) == (profile.sm == 0 or profile.sm >= first)
        assert (fmt.kind in profile.to_json()["formats"]) == profile.supports(fmt)


def test_an_unknown_device_gets_near_names() -> None:
    with pytest.raises(DeviceError, match=r"no device 'RTX 4090'; did you mean rtx-4090"):
        device_profile("RTX 4090")
    with pytest.raises(DeviceError, match="coatrt devices lists all"):
        device_profile("zzz")


def fake_driver(directory: Path, script: str) -> None:
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    os.environ["PATH"] = f"{directory}:{os.environ['PATH']}"


def test_probe_knows_products_and_keeps_unknown_ones_honest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])
    fake_driver(tmp_path, 'echo "NVIDIA GeForce RTX 4090, 8.9, 24564"; echo "NVIDIA Foo 7, 9.0, 1000"')
    known, unknown = probe()
    assert (known.id, known.memory_bytes, known.bandwidth) == ("rtx-4090", 24564 << 20, 1008e9)
    assert (unknown.id, unknown.sm, unknown.builder, unknown.bandwidth) == ("foo-7", 90, "tensorrt", None)


@pytest.mark.parametrize(
    ("line", "known", "memory"),
    [
        ("NVIDIA A100-SXM4-80GB, 8.0, 81920", "a100-80gb", 81920 << 20),
        ("NVIDIA A100-PCIE-40GB, 8.0, 40960", "a100-40gb", 40960 << 20),
        ("NVIDIA GB10, 12.1, [N/A]", "dgx-spark", 128 << 30),
        ("NVIDIA Thing, 12.1, [N/A]", "thing", None),
        ("NVIDIA A1000, 8.6, 8192", "a1000", 8192 << 20),
    ],
)
def test_probe_knows_the_drivers_names(
    line: str, known: str, memory: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])
    fake_driver(tmp_path, f'echo "{line}"')
    (found,) = probe()
    assert (found.id, found.memory_bytes) == (known, memory)


def test_probe_without_a_driver_and_with_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe() == []
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    fake_driver(tmp_path, 'echo "No devices were found"; exit 6')
    with pytest.raises(DeviceError, match=r"nvidia-smi failed \(No devices were found\)"):
        probe()
    fake_driver(tmp_path, 'echo "what"')
    with pytest.raises(DeviceError, match="nvidia-smi printed 'what'"):
        probe()
