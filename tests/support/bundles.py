"""One bundle of a configuration, for tests."""

from pathlib import Path
from typing import Any

from coatrt.adapter.adapter import Adapter
from coatrt.bundle import Bundle
from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import device_profile
from coatrt.engines.bundles.build import build_targets
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.targets import Target
from coatrt.planning.plan import Plan

__all__ = ["make_bundle"]


def make_bundle(
    adapter: Adapter,
    config: QuantConfig,
    name: str,
    output: Path,
    options: BundleOptions | None = None,
    plan: Plan | None = None,
    **more: Any,
) -> Bundle:
    """Make the bundle of one configuration for the device called `name`."""
    (result,) = build_targets(
        adapter, adapter.checkpoint(), [Target(device_profile(name), config, output, plan)], options, **more
    )
    return result.bundle
