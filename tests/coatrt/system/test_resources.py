"""Free memory, with and without a container's limit; devices that are there and that are not."""

from pathlib import Path

import psutil
import pytest
import torch

from coatrt.errors import ConfigError
from coatrt.system.resources import compute_device, free_device_memory, free_memory


@pytest.fixture(autouse=True)
def _mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coatrt.system.resources._MOUNT", tmp_path)


def test_without_a_limit_it_is_the_machines(tmp_path: Path) -> None:
    assert free_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.1)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 1 << 28


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts(tmp_path: Path, version: int) -> None:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    root = tmp_path / "memory" if version == 1 else tmp_path
    root.mkdir(exist_ok=True)
    for name, value in zip(names, (50 << 20, 30 << 20), strict=True):
        (root / name).write_text(f"{value}\n")
    (root / "memory.stat").write_text(f"inactive_file {4 << 20}\ntotal_inactive_file {4 << 20}\nactive_file 1\n")
    assert free_memory() == 24 << 20
    (root / names[1]).write_text(f"{60 << 20}\n")
    assert free_memory() == 0


def test_a_gpu_has_what_the_driver_and_torch_have(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"mem_get_info": (5, 80), "memory_reserved": 40, "memory_allocated": 37}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_device_memory(torch.device("cuda")) == 8


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_devices(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert compute_device("cpu") == torch.device("cpu")
    here = ("cpu", "cpu, cuda", "cpu, cuda, cuda:0, cuda:1")[gpus]
    for text in ("gpu", "mps", "meta", "cuda:9", ""):
        with pytest.raises(
            ConfigError, match="finds no GPU" if text == "cuda:9" and not gpus else f"available: {here}"
        ):
            compute_device(text)
    if gpus:
        assert compute_device(f"cuda:{gpus - 1}") == torch.device("cuda", gpus - 1)
        assert compute_device("cuda") == torch.device("cuda")
    else:
        with pytest.raises(ConfigError, match=r"torch .* finds no GPU for device cuda"):
            compute_device("cuda")
