"""Build kits: what a bundle carries so that its engine can be built on a device whose builder cannot run here."""

import shutil
from dataclasses import asdict
from pathlib import Path

from coatrt.devices.profiles import DeviceProfile
from coatrt.engines.builders import kit_script as build_on_device
from coatrt.engines.builders.builder import EngineShapes
from coatrt.system.json_data import write_json

__all__ = ["KIT_COMMAND", "write_kit"]

KIT_COMMAND = "python build_engine.py"
"""What to type in the bundle, on the device; it needs the package tensorrt and nothing of coatrt."""


def write_kit(directory: Path, device: DeviceProfile, shapes: EngineShapes) -> None:
    """Write build.json and build_engine.py beside base.onnx.

    Args:
        directory: a bundle before it is sealed.
        device: the target.
        shapes: ranges of the engine's dynamic dimensions.
    """
    recipe = {
        "graph": "base.onnx",
        "weights": "weights.bin",
        "engine": f"sm{device.sm}.engine",
        "sm": device.sm,
        "device": device.id,
        "builder": device.builder,
        "shapes": asdict(shapes),
    }
    write_json(directory / "build.json", recipe)
    shutil.copyfile(build_on_device.__file__, directory / "build_engine.py")
