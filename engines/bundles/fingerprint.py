"""A hash of everything a bundle is built from: a bundle whose manifest has the same hash is up to date."""

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
"""Modules and packages whose code determines a bundle's content, subfolders included; a test checks them by imports."""


def writers_hash() -> str:
    """Return the hash of the source files that write bundles: a changed exporter writes other bundles."""
    specs = [spec for name in WRITERS if (spec := importlib.util.find_spec(name)) is not None]
    return code_hash(Path(spec.origin) for spec in specs if spec.origin is not None)


def code_hash(origins: Iterable[Path]) -> str:
    """Return the SHA-256 of the names and bytes of source files.

    Args:
        origins: files of modules; an `__init__.py` stands for its whole folder, subfolders included.
    """
    digest = hashlib.sha256()
    for origin in origins:
        folder = origin.parent
        for path in sorted(folder.rglob("*.py")) if origin.name == "__init__.py" else [origin]:
            digest.update(path.relative_to(folder.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def bundle_fingerprint(adapter: str, target: Target, options: BundleOptions, code: str) -> str:
    """Return 32 hexadecimal digits of a hash over adapter, configuration, device, options, plan, code and versions.

    Args:
        adapter: hash of the adapter.
        target: the bundle's device, configuration and plan.
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
    """Return the bundle in a directory if it is complete and has this fingerprint, else None.

    Only the sizes of its files are compared; `coatrt verify` checks their hashes.

    Args:
        directory: the bundle's directory.
        fingerprint: see `bundle_fingerprint`.
        key: public key that must have signed it; None accepts any bundle.
    """
    try:
        bundle = Bundle.open(directory, key=key)
    except BundleError:
        return None
    return bundle if bundle.manifest.get("fingerprint") == fingerprint else None
