"""Device profiles: properties of a GPU, the weight formats it runs, and the builder of its engines."""

import difflib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import msgspec

from coatrt.errors import DeviceError
from coatrt.quantization.weight_format import KINDS, WeightFormat
from coatrt.system.json_data import to_data

__all__ = ["Builder", "DeviceProfile", "device_profile", "device_profiles", "min_sm"]

Builder = Literal["tensorrt-rtx", "tensorrt", "onnxruntime"]

_MIN_SM = {"int4": 80, "bf16": 80, "fp8": 89, "nvfp4": 100}


def min_sm(weight_format: WeightFormat) -> int:
    """Return the lowest compute capability (86 for SM86) that runs a format; 75 if every GPU does.

    int4 and bf16 need Ampere, fp8 Ada, nvfp4 Blackwell. Everything else runs on Turing, NormalFloat included, whose bit
    planes are INT8 constants. Measured with TensorRT-RTX 1.7.1 for SM75, 80, 86, 89, 120 and 121 (a test repeats the
    limits); for others taken from NVIDIA's tables, not tested.
    """
    return _MIN_SM.get(weight_format.kind, 75)


@dataclass(frozen=True)
class DeviceProfile:
    """A device that engines are built for.

    Args:
        id: the name that users type, such as rtx-4090.
        name: product name, as the driver reports it without the vendor's prefixes.
        sm: compute capability without the dot (86, 120), 0 for the CPU.
        memory_bytes: memory of the device, None where unknown.
        bandwidth: peak memory bandwidth in bytes/s, None where unknown.
        fp16_flops: dense FP16 tensor throughput in FLOP/s with FP32 accumulation, None where unknown.
        builder: builder of its engines.
        sources: sources of the figures.
    """

    id: str
    name: str
    sm: int
    memory_bytes: int | None
    bandwidth: float | None
    fp16_flops: float | None
    builder: Builder
    sources: tuple[str, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of weight formats the device runs."""
        return tuple(kind for kind in KINDS if self.sm == 0 or self.sm >= _MIN_SM.get(kind, 75))

    def supports(self, weight_format: WeightFormat) -> bool:
        """Return whether the device runs a format; a CPU runs all."""
        return weight_format.kind in self.kinds

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, including the kinds of formats."""
        return {**to_data(self), "formats": list(self.kinds)}


@cache
def device_profiles() -> tuple[DeviceProfile, ...]:
    """Return all known devices, by compute capability."""
    data = resources.files("coatrt.devices").joinpath("devices.json").read_bytes()
    return msgspec.json.decode(data, type=tuple[DeviceProfile, ...])


def device_profile(name: str) -> DeviceProfile:
    """Return the profile of a device id.

    Raises:
        DeviceError: no profile has this id.
    """
    profiles = {profile.id: profile for profile in device_profiles()}
    if name in profiles:
        return profiles[name]
    near = difflib.get_close_matches(name.lower().replace(" ", "-").replace("_", "-"), profiles, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else f"known devices: {', '.join(list(profiles)[:4])} and others;"
    )
    raise DeviceError(f"no device {name!r}; {hint} coatrt devices lists all {len(profiles)}")
