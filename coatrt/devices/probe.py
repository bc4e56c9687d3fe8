"""The GPUs of this machine, as the driver reports them."""

import re
import shutil
import subprocess
from dataclasses import replace

from coatrt.devices.profiles import Builder, DeviceProfile, device_profile, device_profiles
from coatrt.errors import DeviceError

__all__ = ["gpu_here", "probe"]

_QUERY = "name,compute_cap,memory.total"
_OTHER_NAMES = {"a100-40gb": r"a100\b.*", "a100-80gb": r"a100\b.*", "dgx-spark": "gb10"}  # patterns, by profile
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


def gpu_here(profile: str | None = None) -> tuple[DeviceProfile, str]:
    """Return the profile of this machine's first GPU, and the GPU's name as the driver has it.

    Args:
        profile: id to take where the GPU's name matches none, of the same compute capability.

    Raises:
        DeviceError: no GPU, no such profile, or none that is the GPU's.
    """
    known = device_profile(profile) if profile is not None else None
    found = probe()
    if not found:
        raise DeviceError("no NVIDIA GPU here (nvidia-smi is not installed or shows none); times of a GPU need one")
    gpu = found[0]
    if known is None and gpu.id not in {one.id for one in device_profiles()}:
        same = ", ".join(one.id for one in device_profiles() if one.sm == gpu.sm) or "none"
        raise DeviceError(
            f"no profile is called {gpu.name}, as this GPU is; give --profile and one of SM{gpu.sm}: {same}"
        )
    if known is not None and known.sm != gpu.sm:
        raise DeviceError(f"--profile {known.id} is SM{known.sm} and this GPU, {gpu.name}, is SM{gpu.sm}; give another")
    return known or gpu, gpu.name


def _profile(line: str) -> DeviceProfile:
    match = re.fullmatch(r"(.+?),\s*(\d+)\.(\d+),\s*(\d+|\[N/A\]|\[Not Supported\])\s*", line.strip())
    if match is None:
        raise DeviceError(
            f"nvidia-smi said {line!r}, not name, compute capability and memory; update the NVIDIA driver"
        )
    name, sm = match[1], int(match[2]) * 10 + int(match[3])
    memory = int(match[4]) << 20 if match[4].isdigit() else None  # GPUs that share the machine's memory name none
    for known in device_profiles():
        if known.sm == sm and _alike(known, name) and _near(known.memory_bytes, memory):
            if memory is None:
                return known
            source = "memory: nvidia-smi on this machine"
            return replace(known, memory_bytes=memory, sources=(*known.sources, source))
    builder: Builder = "tensorrt-rtx" if sm in _RTX_TARGETS else "tensorrt"
    identity = re.sub(r"[^a-z0-9]+", "-", _plain(name)).strip("-")
    return DeviceProfile(identity, name, sm, memory, None, None, builder, ("nvidia-smi on this machine",))


def _alike(known: DeviceProfile, name: str) -> bool:
    """Return whether the driver's name of a GPU is a product's, or one of those that the driver has for it."""
    plain = _plain(name)
    return plain == _plain(known.name) or re.fullmatch(_OTHER_NAMES.get(known.id, ""), plain) is not None


def _plain(name: str) -> str:
    return re.sub(r"\b(nvidia|geforce|tesla)\b", "", name.lower()).strip()


def _near(expected: int | None, found: int | None) -> bool:
    return found is None or (expected is not None and abs(found / expected - 1) < 0.1)
