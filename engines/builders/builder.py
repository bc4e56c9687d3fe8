"""Engine form of a graph → TensorRT engine, built by Polygraphy in a process of its own.

A native builder that dies takes its process with it; here that becomes one BuildError. One optimization profile covers
prefill and decode: with two, TensorRT-RTX 1.7.1 stores the weights twice.
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
from coatrt.devices.profiles import DeviceProfile, least_sm
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
        batch: most sequences at once.
        prefill: most tokens per sequence in one call.
        logits: most positions per sequence that get logits in one call.

    Raises:
        BuildError: a number is not positive.
    """

    batch: Count = 1
    prefill: Count = 512
    logits: Count = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise BuildError(f"engine {name} {value} is given; give at least 1")


@dataclass(frozen=True)
class BuildRecord:
    """What was built.

    Args:
        file: name of the engine file.
        sms: compute capabilities it runs on (86, 120).
        builder: "tensorrt-rtx" or "tensorrt".
        version: of the builder; an engine does not load in another.
        seconds: of the build.
        bytes: of the engine.
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
    """Refuse a configuration that a device cannot run, before any builder is asked.

    Raises:
        FormatError: a matrix has a format, or the activations a type, that the device lacks.
    """
    if activations == "bfloat16" and 0 < device.sm < 80:
        raise FormatError(f"{device.id} (SM{device.sm}) has no bfloat16; take float16 activations")
    wrong = [(name, fmt) for name, fmt in config.formats.items() if not device.supports(fmt)]
    if wrong:
        name, fmt = wrong[0]
        more = f" and {len(wrong) - 1} more matrices" if len(wrong) > 1 else ""
        raise FormatError(
            f"{device.id} (SM{device.sm}) cannot run {fmt} ({name}{more}): it needs SM{least_sm(fmt)} or later; "
            f"allowed there: {', '.join(device.kinds)}"
        )


def installed_builder(builder: str) -> str:
    """Return the version of an installed builder.

    Raises:
        BuildError: it, or Polygraphy, is not installed, or only a stub of it is.
    """
    module = builder.replace("-", "_")
    try:
        require(f"building with {builder}", _EXTRAS[builder])
    except ExtraError as error:
        where = "" if builder == "tensorrt-rtx" else " on the device itself"
        raise BuildError(f"{error}{where}, then build again") from None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(builder)
    return str(importlib.import_module(module).__version__)


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
        BuildError: the builder is absent, has no GPU it needs, refuses the graph, or dies.
    """
    shapes = shapes or EngineShapes()
    if device.builder not in _EXTRAS:
        raise BuildError(f"{device.id} runs graphs in {device.builder}; no engine is built for it")
    version = installed_builder(device.builder)
    sms = tuple(sorted({device.sm, *(other.sm for other in also)}))
    chosen = _gpu(sms) if device.builder == "tensorrt" else {}
    with atomic_file(engine) as temporary:
        request = {
            "graph": str(graph.resolve()),
            "engine": str(temporary.resolve()),
            "builder": device.builder,
            "sms": sms,
            "shapes": asdict(shapes),
        }
        started = time.monotonic()
        _run_worker(request, f"{engine.name} for {_said(sms)}", chosen)
        seconds = time.monotonic() - started
        size = temporary.stat().st_size
    return BuildRecord(engine.name, sms, device.builder, version, seconds, size, shapes)


def _said(sms: Iterable[int]) -> str:
    return f"SM{'/'.join(map(str, sms))}"


def _gpu(sms: tuple[int, ...]) -> dict[str, str]:
    """Return the environment in which CUDA's first GPU has the target's SM: regular TensorRT builds for that one.

    Raises:
        BuildError: no GPU of this machine has it, or several SMs are asked for.
    """
    if len(sms) > 1:
        raise BuildError(f"regular TensorRT builds for one SM, {_said(sms)} are given; build for each on its own")
    try:
        here = [profile.sm for profile in probe()]
    except DeviceError as error:
        raise BuildError(str(error)) from None
    if sms[0] not in here:
        found = f"this machine's GPUs have {_said(sorted(set(here)))}" if here else "this machine has no GPU"
        raise BuildError(f"regular TensorRT needs a GPU with {_said(sms)}, {found}; build on the device")
    if len(set(here)) == 1:
        return {}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(here.index(sms[0]))}  # as nvidia-smi counts


def _run_worker(request: dict[str, Any], what: str, chosen: Mapping[str, str]) -> None:
    rtx = str(int(request["builder"] == "tensorrt-rtx"))
    environment = {**os.environ, **chosen, "POLYGRAPHY_USE_TENSORRT_RTX": rtx}
    command = [sys.executable, "-m", "coatrt.engines.builders.worker", json.dumps({**request, "parent": os.getpid()})]
    said, code = run_child(command, environment)
    size = Path(request["engine"]).stat().st_size
    if code or not size:
        raise BuildError(f"building {what} failed: {_reason(said, code)}")


def _reason(output: str, code: int) -> str:
    """Return the builder's own words: the last lines that are errors."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = [line for line in lines if "[E]" in line or "rror" in line] or lines
    chosen: Sequence[str] = list(dict.fromkeys(told))[:2] or ["no message"]
    died = f" (the builder died with signal {-code})" if code < 0 else ""
    return " | ".join(line[:300] for line in chosen) + died
