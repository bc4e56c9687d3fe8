"""Engine form of a graph → TensorRT engine, built by Polygraphy in a separate process.

A native builder that crashes takes its process with it; here a crash becomes a BuildError. One optimization profile
covers prefill and decode: with two, TensorRT-RTX 1.7.1 stores the weights twice.
"""

import contextlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coatrt.configs.config import QuantConfig
from coatrt.devices.probe import probe
from coatrt.devices.profiles import DeviceProfile, min_sm
from coatrt.errors import BuildError, DeviceError, FormatError
from coatrt.system.extras import ExtraError, require
from coatrt.system.files import atomic_file
from coatrt.system.processes import run_child
from coatrt.system.ranges import Bytes, Count, Measure, Whole

__all__ = ["BuildRecord", "EngineShapes", "build_engine", "check_formats", "installed_builder"]

_EXTRAS = {"tensorrt-rtx": "rtx", "tensorrt": "tensorrt"}


@dataclass(frozen=True)
class EngineShapes:
    """Ranges of the dynamic dimensions of an engine.

    Args:
        batch: largest number of sequences per call.
        prefill: largest number of tokens per sequence and call.
        logits: largest number of positions per sequence and call that get logits.

    Raises:
        BuildError: a number is below 1.
    """

    batch: Count = 1
    prefill: Count = 512
    logits: Count = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise BuildError(f"engine {name} must be at least 1, got {value}")


@dataclass(frozen=True)
class BuildRecord:
    """What the manifest records of an engine.

    Args:
        file: name of the engine file.
        sms: compute capabilities it runs on, such as 86 or 120.
        builder: "tensorrt-rtx" or "tensorrt".
        version: version of the builder; an engine loads in that version only.
        seconds: duration of the build.
        bytes: size of the engine.
        shapes: ranges of its dynamic dimensions.
    """

    file: str
    sms: tuple[Whole, ...]
    builder: str
    version: str
    seconds: Measure
    bytes: Bytes
    shapes: EngineShapes


def check_formats(config: QuantConfig, device: DeviceProfile, activations: str = "float16") -> None:
    """Refuse a configuration that a device cannot run, before any builder starts.

    Raises:
        FormatError: the device does not support a matrix's format or the dtype of the activations.
    """
    if activations == "bfloat16" and 0 < device.sm < 80:
        raise FormatError(f"{device.id} (SM{device.sm}) has no bfloat16; use float16 activations")
    unsupported = [(name, fmt) for name, fmt in config.formats.items() if not device.supports(fmt)]
    if unsupported:
        name, fmt = unsupported[0]
        more = f" and {len(unsupported) - 1} more matrices" if len(unsupported) > 1 else ""
        raise FormatError(
            f"{device.id} (SM{device.sm}) cannot run {fmt} ({name}{more}): it needs SM{min_sm(fmt)} or later; "
            f"allowed there: {', '.join(device.kinds)}"
        )


def installed_builder(builder: str) -> str:
    """Return the version of an installed builder.

    Raises:
        BuildError: the builder or Polygraphy is not installed, or its module does not load.
    """
    module = builder.replace("-", "_")
    try:
        require(f"building with {builder}", _EXTRAS[builder])
    except ExtraError as error:
        where = "" if builder == "tensorrt-rtx" else " on the device itself"
        raise BuildError(f"{error}{where}, then build again") from None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(builder)
    with contextlib.suppress(ImportError, OSError, AttributeError):  # a folder of that name imports too, as a namespace
        return str(importlib.import_module(module).__version__)
    raise BuildError(f"the module {module} here has no version; install {builder} again")


def build_engine(
    graph: Path,
    engine: Path,
    device: DeviceProfile,
    *,
    also: Iterable[DeviceProfile] = (),
    shapes: EngineShapes | None = None,
) -> BuildRecord:
    """Build one engine from the engine form of a graph.

    Args:
        graph: base.onnx with its weights beside it.
        engine: the file to write, atomically.
        device: the target; its builder is used. Regular TensorRT builds on a GPU of this machine with the target's SM.
        also: further targets for the same engine (TensorRT-RTX).
        shapes: ranges of the dynamic dimensions.

    Raises:
        BuildError: the builder is not installed, needs a GPU that this machine lacks, refuses the graph, or crashes.
    """
    shapes = shapes or EngineShapes()
    if device.builder not in _EXTRAS:
        raise BuildError(f"{device.id} runs graphs in {device.builder} and needs no engine; give a GPU")
    version = installed_builder(device.builder)
    sms = tuple(sorted({device.sm, *(other.sm for other in also)}))
    variables = _gpu_variables(sms) if device.builder == "tensorrt" else {}
    with atomic_file(engine) as temporary:
        request = {
            "graph": str(graph.resolve()),
            "engine": str(temporary.resolve()),
            "builder": device.builder,
            "sms": sms,
            "shapes": asdict(shapes),
        }
        start = time.monotonic()
        _run_worker(request, f"{engine.name} for {_sm_text(sms)}", variables)
        seconds = time.monotonic() - start
        size = temporary.stat().st_size
    return BuildRecord(engine.name, sms, device.builder, version, seconds, size, shapes)


def _sm_text(sms: Iterable[int]) -> str:
    return f"SM{'/'.join(map(str, sms))}"


def _gpu_variables(sms: tuple[int, ...]) -> dict[str, str]:
    """Return environment variables that make the GPU with the target's SM CUDA's first: regular TensorRT uses that one.

    Raises:
        BuildError: no GPU of this machine has that SM, or there are several SMs.
    """
    if len(sms) > 1:
        raise BuildError(f"regular TensorRT builds for one SM, got {_sm_text(sms)}; build for each separately")
    try:
        available = [profile.sm for profile in probe()]
    except DeviceError as error:
        raise BuildError(str(error)) from None
    if sms[0] not in available:
        have = (
            f"this machine's GPUs have {_sm_text(sorted(set(available)))}" if available else "this machine has no GPU"
        )
        raise BuildError(f"regular TensorRT needs a GPU with {_sm_text(sms)}, {have}; build on the device")
    if len(set(available)) == 1:
        return {}
    index = str(available.index(sms[0]))  # in the order of nvidia-smi, which is that of the bus
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": index}


def _run_worker(request: dict[str, Any], what: str, variables: Mapping[str, str]) -> None:
    rtx = str(int(request["builder"] == "tensorrt-rtx"))
    environment = {**os.environ, **variables, "POLYGRAPHY_USE_TENSORRT_RTX": rtx}
    # -P: a folder coatrt/ in the working directory, such as a checkout's, is not the package
    module = [sys.executable, "-P", "-m", "coatrt.engines.builders.worker"]
    command = [*module, json.dumps({**request, "parent": os.getpid()})]
    output, code = run_child(command, environment)
    size = Path(request["engine"]).stat().st_size
    if code or not size:
        raise BuildError(f"building {what} failed: {_reason(output, code)}")


def _reason(output: str, code: int) -> str:
    """Return the builder's first two distinct error lines."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "[E]" in line or "rror" in line] or lines
    first: Sequence[str] = list(dict.fromkeys(errors))[:2] or ["no message"]
    crash = f" (the builder died with signal {-code})" if code < 0 else ""
    return " | ".join(line[:300] for line in first) + crash
