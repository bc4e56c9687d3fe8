"""Files of a configuration + engine → the bundle of one device, visible only when it is complete."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coatrt.bundle import Bundle, seal
from coatrt.engines.builders.builder import BuildRecord, build_engine
from coatrt.engines.builders.kit import KIT_COMMAND, write_kit
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.targets import Target
from coatrt.errors import BuildError
from coatrt.system.files import atomic_directory
from coatrt.system.json_data import write_json

__all__ = ["Parts", "seal_bundle"]


@dataclass(frozen=True)
class Parts:
    """The folders a bundle is put together from, and what its manifest says of them.

    Args:
        folders: the files; other bundles may be put together from the same.
        facts: the manifest's keys about them.
        record: of the engine in the last folder; None where there is none.
    """

    folders: tuple[Path, ...]
    facts: Mapping[str, Any]
    record: BuildRecord | None


def seal_bundle(
    target: Target, parts: Parts, options: BundleOptions, fingerprint: str, tell: Callable[[str], None]
) -> Bundle:
    """Put a bundle together at its target's place and open it.

    A device with regular TensorRT gets its engine where this machine has the builder and a GPU of its kind, else a
    build kit.

    Args:
        target: the place, and the device.
        parts: the files.
        options: see `BundleOptions`.
        fingerprint: what the bundle was made from.
        tell: called with a line for the user.
    """
    device = target.device
    with atomic_directory(target.output) as temporary:
        for source in parts.folders:
            shutil.copytree(source, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.engine"))
        engines: list[BuildRecord] = []
        if device.builder == "tensorrt-rtx" and parts.record is not None:
            shutil.copyfile(parts.folders[-1] / parts.record.file, temporary / parts.record.file)
            engines.append(parts.record)
        elif device.builder == "tensorrt" and options.engine:
            engines += _local_engine(temporary, target, options, tell)
        if target.plan is not None:
            write_json(temporary / "plan.json", target.plan.to_json())
        seal(temporary, {**parts.facts, "device": device.to_json(), "engines": engines, "fingerprint": fingerprint})
    return Bundle.open(target.output)


def _local_engine(
    directory: Path, target: Target, options: BundleOptions, tell: Callable[[str], None]
) -> list[BuildRecord]:
    """Build with regular TensorRT where it is installed and a GPU has the target's SM, else leave a build kit."""
    device = target.device
    try:
        engine = directory / f"sm{device.sm}.engine"
        record = build_engine(directory / "base.onnx", engine, device, also=target.also, shapes=options.shapes)
        return [record]
    except BuildError as error:
        write_kit(directory, device, options.shapes)
        tell(f"{device.id}: no engine here ({error}); on the device, in the bundle: {KIT_COMMAND}")
        return []
