"""Builds bundles of given configurations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coatrt.adapter.adapter import Adapter
from coatrt.bundle import Bundle
from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import device_profile
from coatrt.engines.bundles.execute import execute
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.prepare import prepare
from coatrt.engines.bundles.targets import BundleResult, Target
from coatrt.models.checkpoint import Checkpoint
from coatrt.planning.plan import Plan

__all__ = ["build_targets", "make_bundle"]


def build_targets(
    adapter: Adapter,
    checkpoint: Checkpoint,
    targets: Sequence[Target],
    options: BundleOptions | None = None,
    *,
    overwrite: bool = False,
    sign: Path | None = None,
    **changes: Any,
) -> list[BundleResult]:
    """Build a bundle for each target; `changes` are options of `execute`."""
    preparation = prepare(adapter.description, targets, options or BundleOptions(), overwrite=overwrite, sign=sign)
    return execute(preparation, adapter, checkpoint, **changes)


def make_bundle(
    adapter: Adapter,
    config: QuantConfig,
    name: str,
    output: Path,
    options: BundleOptions | None = None,
    plan: Plan | None = None,
    **changes: Any,
) -> Bundle:
    """Build the bundle of one configuration for the device `name`."""
    (result,) = build_targets(
        adapter, adapter.checkpoint(), [Target(device_profile(name), config, output, plan)], options, **changes
    )
    return result.bundle
