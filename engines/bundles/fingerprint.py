"""What a bundle was made from, as one hash: the same hash at the same place means there is nothing to do."""

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path

from coatrt.bundle import Bundle
from coatrt.configs.config import QuantConfig
from coatrt.devices.environment import versions
from coatrt.devices.profiles import DeviceProfile
from coatrt.engines.builders.builder import installed_builder
from coatrt.engines.bundles.options import BundleOptions
from coatrt.errors import BuildError, BundleError
from coatrt.planning.planner import Plan

__all__ = ["is_current", "recipe_hash"]

_PACKAGES = ("coatrt", "coatrt.export", "coatrt.export.weights", "coatrt.engines")


@cache
def _code_hash() -> str:
    """Return the hash of the source files that write bundles: a changed exporter makes other bundles."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec is not None else ():
            for path in sorted(Path(folder).glob("*.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def recipe_hash(
    adapter: str,
    config: QuantConfig,
    device: DeviceProfile,
    options: BundleOptions,
    also: Iterable[DeviceProfile] = (),
    plan: Plan | None = None,
) -> str:
    """Return 32 digits for everything a bundle depends on: adapter, configuration, device, options, plan, code.

    Args:
        adapter: hash of the adapter.
        config: the configuration.
        device: the target.
        options: see `BundleOptions`.
        also: further targets of the engine.
        plan: what is kept as plan.json.
    """
    try:
        builder = installed_builder(device.builder) if options.engine and device.builder != "onnxruntime" else ""
    except BuildError:
        builder = ""
    content = {
        "adapter": adapter,
        "configuration": config.hash,
        "device": [device.to_json(), sorted(other.sm for other in also)],
        "options": asdict(options),
        "plan": plan.to_json() if plan is not None else None,
        "builder": builder,
        "code": _code_hash(),
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def is_current(directory: Path, recipe: str) -> bool:
    """Return whether a whole bundle of this recipe is there; sizes are compared, hashes are for `coatrt verify`."""
    try:
        return bool(Bundle.open(directory).manifest.get("recipe") == recipe)
    except BundleError:
        return False
