"""What this machine has left."""

import contextlib
from pathlib import Path

import psutil

__all__ = ["free_memory"]

_CGROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)  # of versions 2 and 1: limit, use, and the line of memory.stat that says how much of the use is cached files


def free_memory(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that this process can still take without swapping: the machine's, and a container's limit.

    Args:
        cgroups: where Linux mounts control groups.
    """
    free = int(psutil.virtual_memory().available)
    for limit, used, cached in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # another system, another version, or "max": no limit
            most = int((cgroups / limit).read_text(encoding="ascii"))
            taken = int((cgroups / used).read_text(encoding="ascii"))
            lines = (cgroups / used).with_name("memory.stat").read_text(encoding="ascii").splitlines()
            files = next((int(line.split()[1]) for line in lines if line.startswith(f"{cached} ")), 0)
            free = min(free, max(0, most - taken + files))
    return free
