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
    """Plan a configuration for each device and make its bundle; bundles that are up to date are left as they are.

    Args:
        adapter: directory of a trained adapter.
        devices: ids of device profiles, as `coatrt devices` lists them.
        output: the bundle's directory; with several devices, the directory of their bundles.
        request: what is asked of the plans.
        config: this configuration for all devices, in place of planning.
        options: see `BundleOptions`; by default as many positions, sequences and prompt tokens as the request has.
        model: where the adapter's model is now; by default where it was at training.
        cache: engines of earlier builds, see `EngineCache.default`; None builds all.
        slots: how many builders run at once.
        overwrite: replace bundles that are there and are not current.
        sign: PEM file of the private key that signs them; a bundle that it has not signed is not current.
        progress: called as graphs are written.
        tell: called with a line for the user as bundles finish.

    Returns:
        One entry per device, in order.

    Raises:
        DeviceError: no such device, or one that allows none of the adapter's formats.
        FormatError: a device cannot run a format of the configuration.
        BuildError: a builder is not installed or refuses a graph; the other bundles are finished.
        ConfigError: nothing keeps the limits, the configuration does not fit, or a place is in use.
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

    loaded = Adapter.from_pretrained(adapter)
    checkpoint = loaded.checkpoint(model)
    return execute(preparation, loaded, checkpoint, cache=cache, slots=slots, progress=progress, tell=tell)
