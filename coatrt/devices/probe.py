"""The GPUs of this machine, as the driver reports them."""

import re
import shutil
import subprocess
from dataclasses import replace

from coatrt.devices.profiles import Builder, DeviceProfile, device_profile, device_profiles
from coatrt.errors import DeviceError

__all__ = ["local_gpu", "probe"]

_QUERY = "name,compute_cap,memory.total"
_OTHER_NAMES = {
    "a100-40gb": r"a100\b.*",
    "a100-80gb": r"a100\b.*",
    "dgx-spark": "gb10",
}  # profile id → pattern of the driver's name
_RTX_TARGETS = (75, 80, 86, 89, 120, 121)  # the ComputeCapability enum of TensorRT-RTX 1.7


def probe() -> list[DeviceProfile]:
    """Return a profile per GPU that nvidia-smi reports; an empty list without GPU or driver.

    A known product has the figures of its profile, but the driver's memory size. Bandwidth and FLOPS of an unknown one
    are None.

    Raises:
        DeviceError: nvidia-smi is installed and fails, or its output cannot be parsed.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"nvidia-smi cannot be run ({error}); check the NVIDIA driver") from None
    if process.returncode:
        reason = (process.stdout + process.stderr).strip().splitlines() or ["no message"]
        raise DeviceError(f"nvidia-smi failed ({reason[0]}); check the NVIDIA driver")
    return [_profile(line) for line in process.stdout.splitlines() if line.strip()]


def local_gpu(profile: str | None = None) -> tuple[DeviceProfile, str]:
    """Return the profile of this machine's first GPU and the driver's name of it.

    Args:
        profile: profile id of the same compute capability, for a GPU that no profile names.

    Raises:
        DeviceError: no GPU, no such profile, or none that matches the GPU.
    """
    requested = device_profile(profile) if profile is not None else None
    gpus = probe()
    if not gpus:
        raise DeviceError("no NVIDIA GPU (nvidia-smi is missing or shows none); measure on the device itself")
    gpu = gpus[0]
    if requested is None and gpu.id not in {one.id for one in device_profiles()}:
        same = ", ".join(one.id for one in device_profiles() if one.sm == gpu.sm) or "none"
        raise DeviceError(f"no profile for this GPU, {gpu.name}; give --profile with one of SM{gpu.sm}: {same}")
    if requested is not None and requested.sm != gpu.sm:
        raise DeviceError(
            f"--profile must be of SM{gpu.sm} like this GPU, {gpu.name}; {requested.id} is SM{requested.sm}"
        )
    return requested or gpu, gpu.name


def _profile(line: str) -> DeviceProfile:
    match = re.fullmatch(r"(.+?),\s*(\d+)\.(\d+),\s*(\d+|\[N/A\]|\[Not Supported\])\s*", line.strip())
    if match is None:
        raise DeviceError(
            f"nvidia-smi printed {line!r} instead of name, compute capability and memory; update the NVIDIA driver"
        )
    name, sm = match[1], int(match[2]) * 10 + int(match[3])
    memory = int(match[4]) << 20 if match[4].isdigit() else None  # GPUs that share the host's memory report none
    for product in device_profiles():
        if product.sm == sm and _same_name(product, name) and _similar_memory(product.memory_bytes, memory):
            if memory is None:
                return product
            source = "memory: nvidia-smi on this machine"
            return replace(product, memory_bytes=memory, sources=(*product.sources, source))
    builder: Builder = "tensorrt-rtx" if sm in _RTX_TARGETS else "tensorrt"
    identity = re.sub(r"[^a-z0-9]+", "-", _plain(name)).strip("-")
    return DeviceProfile(identity, name, sm, memory, None, None, builder, ("nvidia-smi on this machine",))


def _same_name(product: DeviceProfile, name: str) -> bool:
    """Return whether the driver's name of a GPU is the product's name or a known alias."""
    plain = _plain(name)
    return plain == _plain(product.name) or re.fullmatch(_OTHER_NAMES.get(product.id, ""), plain) is not None


def _plain(name: str) -> str:
    return re.sub(r"\b(nvidia|geforce|tesla)\b", "", name.lower()).strip()


def _similar_memory(expected: int | None, reported: int | None) -> bool:
    return reported is None or (expected is not None and abs(reported / expected - 1) < 0.1)
