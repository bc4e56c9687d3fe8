"""Free memory of this machine and its torch devices."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from coatrt.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["compute_device", "free_device_memory", "free_memory"]

_MOUNT = Path("/sys/fs/cgroup")  # of Linux's control groups
_CGROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)  # versions 2 and 1: limit, use, and the line of memory.stat with the cached files in that use


def free_memory() -> int:
    """Return the bytes that this process can still allocate without swapping, within a container's limit."""
    free = int(psutil.virtual_memory().available)
    for limit, usage, inactive in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # another system, another version, or "max": no limit
            limit_bytes = int((_MOUNT / limit).read_text(encoding="ascii"))
            in_use = int((_MOUNT / usage).read_text(encoding="ascii"))
            lines = (_MOUNT / usage).with_name("memory.stat").read_text(encoding="ascii").splitlines()
            files = next((int(line.split()[1]) for line in lines if line.startswith(f"{inactive} ")), 0)
            free = min(free, max(0, limit_bytes - in_use + files))
    return free


def free_device_memory(device: "torch.device") -> int:
    """Return the bytes still free for tensors on a GPU, including those that torch has reserved."""
    import torch

    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reserved


def compute_device(text: str) -> "torch.device":
    """Return the torch device of a name such as "cpu", "cuda" or "cuda:1".

    Raises:
        ConfigError: this machine has no such device, or torch cannot use it.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ", ".join(["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count) if count > 1)])
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ConfigError(f"no device {text!r}; available: {here}") from None
    if device.type == "cuda" and not count:
        raise ConfigError(
            f"torch {torch.__version__} finds no GPU for device {text} (a CPU build of torch, or no NVIDIA driver); "
            "use cpu"
        )
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= max(count, 1):
        raise ConfigError(f"no device {text!r}; available: {here}")
    return device
