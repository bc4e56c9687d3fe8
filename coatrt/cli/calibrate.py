"""`coatrt devices calibrate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coatrt.cli.common import JSON, MODEL, PATH, check_writable, echo_json, runtime_options

if TYPE_CHECKING:
    from coatrt.adapter.adapter import Adapter
    from coatrt.devices.profiles import DeviceProfile
    from coatrt.engines.measure.trt_timings import MakeBundle
    from coatrt.models.checkpoint import Checkpoint
    from coatrt.planning.measured_latency import MeasuredLatency

__all__ = ["calibrate"]

_ENGINE_CONTEXT = 2048


@click.command()
@click.argument("adapter", type=PATH)
@MODEL
@runtime_options("backend", "threads", "accuracy_level")
@click.option("--profile", help="Device profile to keep the timings for, where the GPU's name matches none.")
@JSON
def calibrate(adapter: Path, model: str | None, profile: str | None, as_json: bool, **runtime: Any) -> None:
    """Time ADAPTER's model on this machine; plans for it predict with that from then on.

    ort times every product on the CPU, cuda on the GPU; trt builds and times an engine in each format.
    """
    from coatrt.system.extras import require

    require("coatrt devices calibrate", "train", "cpu")
    from coatrt.adapter.adapter import Adapter
    from coatrt.cli.progress import drawn_progress
    from coatrt.devices.probe import gpu_here
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
            raise ConfigError(
                f"--profile {profile} is given and --backend ort times the CPU; give --backend cuda or trt"
            )
        device, gpu = device_profile("cpu"), ""
    else:
        device, gpu = gpu_here(profile)
    loaded, path = Adapter.from_pretrained(adapter), timings_path(device.id, options.backend)
    check_writable(path)
    with drawn_progress("calibrate") as progress:
        checkpoint = loaded.checkpoint(model)
        if options.backend == "ort":
            made = time_cpu(loaded, checkpoint, options, progress=progress)
        elif options.backend == "cuda":
            made = time_cuda(loaded, checkpoint, device.id, gpu=gpu, progress=progress)
        else:
            from coatrt.engines.measure.trt_timings import time_trt

            made = time_trt(loaded.description, device, _maker(loaded, checkpoint, device), gpu=gpu, progress=progress)
    try:
        write_json(path, made, sealed=True)
    finally:  # what was measured is shown, kept or not
        _show(made, as_json)
    if not as_json:
        click.echo(f"{path}: {made.source}")


def _maker(adapter: "Adapter", checkpoint: "Checkpoint", device: "DeviceProfile") -> "MakeBundle":
    """Return what makes a bundle of a configuration with an engine for this machine."""
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


def _show(made: "MeasuredLatency", as_json: bool) -> None:
    if as_json:
        echo_json(made)
        return
    rows = [("K", "N", "tokens", "µs", "format")]
    rows += [(str(p.K), str(p.N), str(p.tokens), f"{p.seconds * 1e6:.1f}", p.format) for p in made.products]
    from coatrt.system.text_table import aligned

    click.echo(aligned(rows, ">>>><"))
    for rest in made.rests:
        lora = "" if rest.shape[-1] else ", no LoRA"
        click.echo(f"all else, {rest.tokens} tokens, {rest.context} slots{lora}: {rest.seconds * 1e3:.2f} ms")
