"""The GPUs of this machine, as the driver reports them."""

import re
import shutil
import subprocess
from dataclasses import replace

from coatrt.devices import Builder, DeviceProfile, devices
from coatrt.errors import DeviceError

__all__ = ["probe"]

_QUERY = "name,compute_cap,memory.total"
_RTX_TARGETS = (75, 80, 86, 89, 120, 121)  # the ComputeCapability enum of TensorRT-RTX 1.7


def probe() -> list[DeviceProfile]:
    """Return a profile per GPU of this machine, asked of nvidia-smi; an empty list where there is none.

    Figures of a known product come from its profile, its memory from the driver; of an unknown one bandwidth and FLOPS
    stay None.

    Raises:
        DeviceError: nvidia-smi is there and fails, or says what we cannot read.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"nvidia-smi cannot be run ({error}); check the NVIDIA driver") from None
    if done.returncode:
        reason = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        raise DeviceError(f"nvidia-smi failed ({reason[0]}); check the NVIDIA driver")
    return [_profile(line) for line in done.stdout.splitlines() if line.strip()]


def _profile(line: str) -> DeviceProfile:
    match = re.fullmatch(r"(.+?),\s*(\d+)\.(\d+),\s*(\d+)\s*", line.strip())
    if match is None:
        raise DeviceError(
            f"nvidia-smi said {line!r}, not name, compute capability and memory; update the NVIDIA driver"
        )
    name, sm, memory = match[1], int(match[2]) * 10 + int(match[3]), int(match[4]) << 20
    for known in devices():
        if known.sm == sm and _plain(known.name) == _plain(name) and _near(known.memory_bytes, memory):
            source = "memory: nvidia-smi on this machine"
            return replace(known, memory_bytes=memory, sources=(*known.sources, source))
    builder: Builder = "tensorrt-rtx" if sm in _RTX_TARGETS else "tensorrt"
    identity = re.sub(r"[^a-z0-9]+", "-", _plain(name)).strip("-")
    return DeviceProfile(identity, name, sm, memory, None, None, builder, ("nvidia-smi on this machine",))


def _plain(name: str) -> str:
    return re.sub(r"\b(nvidia|geforce|tesla)\b", "", name.lower()).strip()


def _near(expected: int | None, found: int) -> bool:
    return expected is not None and abs(found / expected - 1) < 0.1
