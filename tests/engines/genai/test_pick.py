"""The variant for a device."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coatrt.devices.profiles import device_profile
from coatrt.engines.genai import pick
from coatrt.engines.genai.pick import pick_variant
from coatrt.errors import BundleError, DeviceError

BITS = {"rtx-3050-laptop": 2.9, "rtx-4060": 4.25, "rtx-4090": 6.0, "cpu": 5.0}


def write(directory: Path, names: list[str], **changes: Any) -> Path:
    variants = {
        name: {
            "variant_directory": name,
            "ep": f"{'CPU' if name == 'cpu' else 'CUDA'}ExecutionProvider",
            "additional_metadata": {"device": device_profile(name).to_json(), "average_bits": BITS[name]},
            **changes,
        }
        for name in names
    }
    directory.mkdir()
    manifest = {"schema_version": "1.0", "components": {"model": {"variants": variants}}}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_the_device_s_own_the_best_that_fits_or_the_cpu_s(tmp_path: Path) -> None:
    package = write(tmp_path / "p", list(BITS))
    for device, expected in (
        ("rtx-4060", "rtx-4060"),
        ("cpu", "cpu"),
        ("rtx-5090", "rtx-4090"),  # 32 GB: more bits than the variant for 8 GB
        ("rtx-4070", "rtx-4060"),  # 12 GB
        ("t4", "rtx-4060"),  # 16 GB
    ):
        assert pick_variant(package, device) == package / expected, device
    small = replace(device_profile("rtx-4060"), id="small", memory_bytes=1 << 30)
    assert pick_variant(package, small) == package / "cpu"
    assert pick_variant(package, replace(small, memory_bytes=None)) == package / "cpu"


def test_by_default_the_device_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = write(tmp_path / "p", list(BITS))
    monkeypatch.setattr(pick, "probe", lambda: [])
    assert pick_variant(package) == package / "cpu"
    monkeypatch.setattr(pick, "probe", lambda: [device_profile("rtx-4090"), device_profile("l4")])
    assert pick_variant(package) == package / "rtx-4090"


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"not a model package: .* \(no manifest.json\)"):
        pick_variant(tmp_path)
    with pytest.raises(DeviceError, match="has no variant for cpu; it has rtx-4090 for CUDAExecutionProvider"):
        pick_variant(write(tmp_path / "gpu", ["rtx-4090"]), "cpu")
    with pytest.raises(DeviceError, match="no device 'nothing'"):
        pick_variant(tmp_path / "gpu", "nothing")
    for folder in ("../elsewhere", "/etc", "a\\b"):
        away = write(tmp_path / folder.replace("/", "_").replace("\\", "_"), ["cpu"], variant_directory=folder)
        with pytest.raises(BundleError, match="leaves the package; do not use it"):
            pick_variant(away, "cpu")
    (tmp_path / "gpu" / "manifest.json").write_text('{"components": 1}')
    with pytest.raises(BundleError, match="model package"):
        pick_variant(tmp_path / "gpu", "cpu")
