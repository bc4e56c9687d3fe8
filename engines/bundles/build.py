"""Adapter + devices → bundles: plan, prepare, execute."""

from collections.abc import Callable, Sequence
from pathlib import Path

from coatrt.adapter.description import AdapterDescription
from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import device_profile
from coatrt.engines.builders.builder_slots import BuilderSlots
from coatrt.engines.builders.engine_cache import EngineCache
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.prepare import prepare
from coatrt.engines.bundles.targets import BundleResult, plan_targets
from coatrt.errors import ConfigError
from coatrt.planning.archive import adapter_archive
from coatrt.planning.plan import PlanRequest
from coatrt.system.extras import require
from coatrt.system.progress import Progress, silent

__all__ = ["build"]


def build(
    adapter: str | Path,
    devices: Sequence[str],
    output: str | Path,
    *,
    request: PlanRequest | None = None,
    config: QuantConfig | None = None,
    options: BundleOptions | None = None,
    model: str | Path | None = None,
    cache: EngineCache | None = None,
    slots: BuilderSlots | None = None,
    overwrite: bool = False,
    sign: str | Path | None = None,
    progress: Progress = silent,
    tell: Callable[[str], None] | None = None,
) -> list[BundleResult]:
    """Plan a configuration for each device and build its bundle; bundles that are up to date are left unchanged.

    Args:
        adapter: directory of a trained adapter.
        devices: ids of device profiles, as listed by `coatrt devices`.
        output: the bundle's directory; with several devices, the parent directory of their bundles.
        request: requirements of the plans.
        config: a configuration for all devices; None plans one for each device.
        options: see `BundleOptions`; by default the context, batch and prefill length of the request.
        model: the adapter's model; by default its path at training.
        cache: cache of engines, see `EngineCache.default`; None builds every engine.
        slots: limit on the builders that run at once.
        overwrite: replace bundles that exist and are out of date.
        sign: PEM file of the private key to sign with; a bundle without its signature is out of date.
        progress: called as graphs are written.
        tell: called with a line for the user as bundles finish.

    Returns:
        One entry per device, in order.

    Raises:
        DeviceError: a device is unknown, or supports none of the adapter's formats.
        FormatError: a device cannot run a format of the configuration.
        BuildError: a builder is not installed or refuses a graph; the other bundles are finished.
        ConfigError: no configuration meets the limits, the given one does not fit, or an output is in use.
    """
    if isinstance(devices, str):
        raise ConfigError(f"devices must be a list of ids, got {devices!r}; give [{devices!r}]")
    request = request or PlanRequest()
    description = AdapterDescription.load(adapter)
    profiles = [device_profile(name) for name in dict.fromkeys(devices)]
    choice = None if config is None else (config, None)
    archive = adapter_archive(adapter)
    targets = plan_targets(description, profiles, Path(output), request, choice=choice, archive=archive)
    preparation = prepare(description, targets, options or BundleOptions.of(request), overwrite=overwrite, sign=sign)
    if not preparation.jobs:  # neither torch nor the model is needed to say so
        return [preparation.current[target.output] for target in targets]
    require("coatrt.build", "train", "cpu")
    from coatrt.adapter.adapter import Adapter
    from coatrt.engines.bundles.execute import execute

    trained = Adapter.from_pretrained(adapter)
    checkpoint = trained.checkpoint(model)
    return execute(preparation, trained, checkpoint, cache=cache, slots=slots, progress=progress, tell=tell)
