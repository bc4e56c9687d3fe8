"""What this machine has: memory left, and devices that torch computes on."""

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
)  # of versions 2 and 1: limit, use, and the line of memory.stat that says how much of the use is cached files


def free_memory() -> int:
    """Return the bytes that this process can still take without swapping: the machine's, and a container's limit."""
    free = int(psutil.virtual_memory().available)
    for limit, used, cached in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # another system, another version, or "max": no limit
            most = int((_MOUNT / limit).read_text(encoding="ascii"))
            taken = int((_MOUNT / used).read_text(encoding="ascii"))
            lines = (_MOUNT / used).with_name("memory.stat").read_text(encoding="ascii").splitlines()
            files = next((int(line.split()[1]) for line in lines if line.startswith(f"{cached} ")), 0)
            free = min(free, max(0, most - taken + files))
    return free


def free_device_memory(device: "torch.device") -> int:
    """Return the bytes that tensors can still take on a GPU, those that torch holds unused among them."""
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def compute_device(text: str) -> "torch.device":
    """Return the torch device of a name such as "cpu", "cuda" or "cuda:1".

    Raises:
        ConfigError: there is no such device here, or torch cannot use it.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ", ".join(["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count) if count > 1)])
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ConfigError(f"no device {text!r}; here are {here}") from None
    if device.type == "cuda" and not count:
        raise ConfigError(
            f"the device {text} is given and torch {torch.__version__} finds no GPU: it is a CPU build, or a driver is "
            "missing; give cpu"
        )
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= max(count, 1):
        raise ConfigError(f"the device {text} is given; here are {here}")
    return device
