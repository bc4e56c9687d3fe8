"""The environment of a measurement: machine, versions, GPU."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from coatrt import __version__
from coatrt.devices.probe import probe
from coatrt.errors import DeviceError

__all__ = ["environment", "usable_cores", "versions"]

_PACKAGES = (
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-rtx",
    "tensorrt",
    "polygraphy",
    "numpy",
)


def versions() -> dict[str, str]:
    """Return the versions of coatrt, Python and the installed packages that results depend on."""
    versions_by_package = {"coatrt": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions_by_package[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions_by_package


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Return CPU, usable cores, memory in bytes, GPUs, operating system and package versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    try:
        gpus = [profile.name for profile in probe()]
    except DeviceError as error:
        gpus = [f"unknown: {error}"]
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": memory,
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }
