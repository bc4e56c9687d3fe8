"""Which variant of a package a machine loads."""

from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from coatrt.bundle import MANIFEST
from coatrt.devices.probe import probe
from coatrt.devices.profiles import DeviceProfile, device_profile
from coatrt.engines.genai.package import COMPONENT, PROVIDERS
from coatrt.errors import BundleError, DeviceError
from coatrt.system.json_data import read_as

__all__ = ["pick_variant"]


class _Device(TypedDict, total=False):
    id: str
    sm: int
    memory_bytes: int | None


class _Metadata(TypedDict, total=False):
    device: _Device
    average_bits: float


class _Variant(TypedDict, total=False):
    variant_directory: str
    ep: str
    additional_metadata: _Metadata


class _Component(TypedDict):
    variants: dict[str, _Variant]


class _Package(TypedDict):
    schema_version: Any
    components: dict[str, _Component]


def pick_variant(package: str | Path, device: str | DeviceProfile | None = None) -> Path:
    """Return the directory in a model package that onnxruntime-genai should load on a device.

    That is the variant for this device; else, on a GPU, the variant with the most bits per weight among those for GPUs
    with no more memory; else a variant for the CPU.

    Args:
        package: directory of a package that `package_genai` wrote.
        device: a device's id or profile, see `coatrt devices`; by default the first GPU of this machine, or its CPU.

    Raises:
        BundleError: not such a package.
        DeviceError: the device is unknown, or no variant suits it.
    """
    package = Path(package)
    if not (package / MANIFEST).is_file():
        raise BundleError(f"not a model package: {package} (no {MANIFEST}); create one with coatrt export")
    manifest = read_as(package / MANIFEST, _Package, "model package", "export it again", BundleError)
    variants = manifest["components"].get(COMPONENT, {"variants": {}})["variants"]
    if device is None:
        device = next(iter(probe()), device_profile("cpu"))
    profile = device_profile(device) if isinstance(device, str) else device
    own = [name for name, variant in variants.items() if _device(variant).get("id") == profile.id]
    fitting = [name for name, variant in variants.items() if profile.sm and _fits(variant, profile)]
    on_cpu = [name for name, variant in variants.items() if variant.get("ep") == PROVIDERS["cpu"]]
    best = sorted(fitting, key=lambda name: -variants[name].get("additional_metadata", {}).get("average_bits", 0.0))
    for name in (*own, *best, *on_cpu):
        return package / _inside(variants[name].get("variant_directory", name), package)
    named = ", ".join(f"{name} for {variant.get('ep', 'no provider')}" for name, variant in variants.items()) or "none"
    raise DeviceError(f"{package} has no variant for {profile.id}; it has {named}")


def _inside(folder: str, package: Path) -> str:
    if PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts or "\\" in folder:
        raise BundleError(f"{package / MANIFEST} names {folder!r}, which leaves the package; do not use it")
    return folder


def _device(variant: _Variant) -> _Device:
    return variant.get("additional_metadata", {}).get("device", {})


def _fits(variant: _Variant, profile: DeviceProfile) -> bool:
    """Return whether a variant for another GPU runs on this one: its weights were planned for no more memory."""
    planned, memory = _device(variant).get("memory_bytes"), profile.memory_bytes
    if variant.get("ep") != PROVIDERS["cuda"] or planned is None or memory is None:
        return False
    return planned <= memory
