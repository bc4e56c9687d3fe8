"""`coatrt devices calibrate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coatrt.cli.common import JSON, MODEL, PATH, check_writable, echo_json, runtime_options
from coatrt.cli.help import documented

if TYPE_CHECKING:
    from coatrt.adapter.adapter import Adapter
    from coatrt.devices.profiles import DeviceProfile
    from coatrt.engines.measure.trt_timings import MakeBundle
    from coatrt.models.checkpoint import Checkpoint
    from coatrt.planning.measured_latency import MeasuredLatency

__all__ = ["calibrate"]

_ENGINE_CONTEXT = 2048


@documented(
    examples=(
        "coatrt devices calibrate adapter",
        "coatrt devices calibrate adapter --backend cuda",
        "coatrt devices calibrate adapter --backend trt --profile l4",
    )
)
@click.argument("adapter", type=PATH)
@MODEL
@runtime_options("backend", "threads", "accuracy_level")
@click.option("--profile", metavar="DEVICE", help="Device of the timings, if the GPU's name is not a known one.")
@JSON
def calibrate(adapter: Path, model: str | None, profile: str | None, as_json: bool, **runtime: Any) -> None:
    """Time an adapter's model on this machine, for later plans.

    ort times every matrix product on the CPU, cuda on the GPU; trt builds and times an engine in each format. ADAPTER
    is a directory that coatrt train wrote.
    """
    from coatrt.system.extras import require

    require("coatrt devices calibrate", "train", "cpu")
    from coatrt.adapter.adapter import Adapter
    from coatrt.cli.progress import drawn_progress
    from coatrt.devices.probe import local_gpu
    from coatrt.devices.profiles import device_profile
    from coatrt.engines.measure.cpu_timings import time_cpu
    from coatrt.engines.measure.cuda_timings import time_cuda
    from coatrt.engines.runtime.options import RuntimeOptions
    from coatrt.errors import ConfigError
    from coatrt.planning.measured_latency import timings_path
    from coatrt.system.json_data import write_json

    options = RuntimeOptions(**runtime)
    if options.backend == "ort":
        if profile not in (None, "cpu"):
            raise ConfigError(f"--backend ort times the CPU, --profile {profile} is a GPU; give --backend cuda or trt")
        device, gpu = device_profile("cpu"), ""
    else:
        device, gpu = local_gpu(profile)
    loaded, path = Adapter.from_pretrained(adapter), timings_path(device.id, options.backend)
    check_writable(path)
    with drawn_progress("calibrate") as progress:
        checkpoint = loaded.checkpoint(model)
        if options.backend == "ort":
            timings = time_cpu(loaded, checkpoint, options, progress=progress)
        elif options.backend == "cuda":
            timings = time_cuda(loaded, checkpoint, device.id, gpu=gpu, progress=progress)
        else:
            from coatrt.engines.measure.trt_timings import time_trt

            make = _maker(loaded, checkpoint, device)
            timings = time_trt(loaded.description, device, make, gpu=gpu, progress=progress)
    try:
        write_json(path, timings, sealed=True)
    finally:  # timings that cannot be written are printed
        _show(timings, as_json)
    if not as_json:
        click.echo(f"{path}: {timings.source}")


def _maker(adapter: "Adapter", checkpoint: "Checkpoint", device: "DeviceProfile") -> "MakeBundle":
    """Return a function that builds a bundle of a configuration, with an engine for this machine."""
    from coatrt.bundle import Bundle
    from coatrt.configs.config import QuantConfig
    from coatrt.engines.builders.engine_cache import EngineCache
    from coatrt.engines.bundles.execute import execute
    from coatrt.engines.bundles.options import BundleOptions
    from coatrt.engines.bundles.prepare import prepare
    from coatrt.engines.bundles.targets import Target

    description = adapter.description
    context = min(_ENGINE_CONTEXT, description.spec.max_positions)

    def make(config: QuantConfig, directory: Path) -> Bundle:
        prepared = prepare(description, [Target(device, config, directory)], BundleOptions(context=context))
        (result,) = execute(prepared, adapter, checkpoint, cache=EngineCache.default())
        return result.bundle

    return make


def _show(timings: "MeasuredLatency", as_json: bool) -> None:
    if as_json:
        echo_json(timings)
        return
    rows = [("K", "N", "tokens", "µs", "format")]
    rows += [(str(p.K), str(p.N), str(p.tokens), f"{p.seconds * 1e6:.1f}", p.format) for p in timings.products]
    from coatrt.system.text_table import aligned

    click.echo(aligned(rows, ">>>><"))
    for rest in timings.rests:
        lora = "" if rest.shape[-1] else ", no LoRA"
        click.echo(f"all else, {rest.tokens} tokens, {rest.context} slots{lora}: {rest.seconds * 1e3:.2f} ms")
