"""Files of a configuration and engine → the bundle of one device, which appears only when it is complete."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coatrt.bundle import Bundle, seal, sign_manifest
from coatrt.engines.builders import kit_script
from coatrt.engines.builders.builder import BuildRecord, build_engine
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.targets import Target
from coatrt.errors import BuildError
from coatrt.system.files import atomic_directory
from coatrt.system.json_data import write_json

__all__ = ["seal_bundle"]


def seal_bundle(
    target: Target,
    folders: tuple[Path, ...],
    facts: Mapping[str, Any],
    record: BuildRecord | None,
    options: BundleOptions,
    tell: Callable[[str], None],
    sign: str | Path | None = None,
) -> Bundle:
    """Assemble a bundle in its target's output directory and open it.

    For a device with regular TensorRT, the engine is built if this machine has the builder and a GPU of that compute
    capability; otherwise the bundle gets a build kit.

    Args:
        target: device, output directory and plan.
        folders: directories of the bundle's files, which are copied: other bundles may need them too.
        facts: the manifest's entries of these files, and the fingerprint.
        record: record of the TensorRT-RTX engine in the last folder; None if there is none.
        options: see `BundleOptions`.
        tell: called with a line for the user.
        sign: PEM file of the private key to sign with; None for an unsigned bundle.
    """
    device = target.device
    with atomic_directory(target.output) as temporary:
        for source in folders:
            shutil.copytree(source, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.engine"))
        engines: list[BuildRecord] = []
        if device.builder == "tensorrt-rtx" and record is not None:
            shutil.copyfile(folders[-1] / record.file, temporary / record.file)
            engines.append(record)
        elif device.builder == "tensorrt" and options.engine:
            engines += _local_engine(temporary, target, options, tell)
        if target.plan is not None:
            write_json(temporary / "plan.json", target.plan.to_json())
        seal(temporary, {**facts, "device": device.to_json(), "engines": engines})
        if sign is not None:
            sign_manifest(temporary, sign)
    return Bundle.open(target.output)


def _local_engine(
    directory: Path, target: Target, options: BundleOptions, tell: Callable[[str], None]
) -> list[BuildRecord]:
    """Build with regular TensorRT if it is installed and a GPU has the target's SM; otherwise add a build kit.

    The kit needs only the package tensorrt on the device, not coatrt.
    """
    device = target.device
    engine = directory / f"sm{device.sm}.engine"
    try:
        return [build_engine(directory / "base.onnx", engine, device, shapes=options.shapes)]
    except BuildError as error:
        recipe = {
            "graph": "base.onnx",
            "weights": "weights.bin",
            "engine": engine.name,
            "sm": device.sm,
            "device": device.id,
            "builder": device.builder,
            "shapes": asdict(options.shapes),
        }
        write_json(directory / "build.json", recipe)
        shutil.copyfile(kit_script.__file__, directory / "build_engine.py")
        tell(f"{device.id}: no engine built here: {error}; or run python build_engine.py in the bundle on the device")
        return []
