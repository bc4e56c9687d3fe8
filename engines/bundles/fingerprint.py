"""What a bundle was made from, as one hash: the same hash at the same place means there is nothing to do."""

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from coatrt.bundle import Bundle
from coatrt.devices.environment import versions
from coatrt.engines.builders.builder import installed_builder
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.targets import Target
from coatrt.errors import BuildError, BundleError

__all__ = ["WRITERS", "bundle_fingerprint", "code_hash", "current_bundle", "writers_hash"]

WRITERS = (
    "coatrt.bundle",
    "coatrt.system",
    "coatrt.models",
    "coatrt.quantization",
    "coatrt.configs",
    "coatrt.devices",
    "coatrt.adapter",
    "coatrt.export",
    "coatrt.engines.runtime",
    "coatrt.engines.builders",
    "coatrt.engines.bundles",
)
"""Modules and rooms whose code decides what is in a bundle, subfolders included; a test holds them against imports."""


def writers_hash() -> str:
    """Return the hash of the source files that write bundles: a changed exporter makes other bundles."""
    specs = [spec for name in WRITERS if (spec := importlib.util.find_spec(name)) is not None]
    return code_hash(Path(spec.origin) for spec in specs if spec.origin is not None)


def code_hash(origins: Iterable[Path]) -> str:
    """Return the SHA-256 over the names and bytes of source files, those of a package with all below it.

    Args:
        origins: modules; an `__init__.py` stands for its whole folder.
    """
    digest = hashlib.sha256()
    for origin in origins:
        folder = origin.parent
        for path in sorted(folder.rglob("*.py")) if origin.name == "__init__.py" else [origin]:
            digest.update(path.relative_to(folder.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def bundle_fingerprint(adapter: str, target: Target, options: BundleOptions, code: str) -> str:
    """Return 32 digits for everything a bundle depends on: adapter, configuration, device, options, plan, code.

    Args:
        adapter: hash of the adapter.
        target: what the bundle is made for.
        options: see `BundleOptions`.
        code: see `writers_hash`.
    """
    device, plan = target.device, target.plan
    try:
        builder = installed_builder(device.builder) if options.engine and device.builder != "onnxruntime" else ""
    except BuildError:
        builder = ""
    content = {
        "adapter": adapter,
        "configuration": target.config.hash,
        "device": device.to_json(),
        "options": asdict(options),
        "plan": plan.to_json() if plan is not None else None,
        "builder": builder,
        "code": code,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def current_bundle(directory: Path, fingerprint: str, key: bytes | None = None) -> Bundle | None:
    """Return the whole bundle of a fingerprint, if it is there; sizes are compared, `coatrt verify` checks hashes.

    Args:
        directory: where it is.
        fingerprint: see `bundle_fingerprint`.
        key: public key that must have signed it.
    """
    try:
        bundle = Bundle.open(directory, key=key)
    except BundleError:
        return None
    return bundle if bundle.manifest.get("fingerprint") == fingerprint else None
