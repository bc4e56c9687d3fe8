"""What bundles are made for, and what came of it; read without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coatrt.adapter.description import AdapterDescription
from coatrt.bundle import Bundle
from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import DeviceProfile
from coatrt.planning.archive import Archive
from coatrt.planning.plan import Plan, PlanRequest
from coatrt.planning.planner import plan_fleet

__all__ = ["BundleResult", "Target", "plan_targets"]


@dataclass(frozen=True)
class Target:
    """A bundle to make.

    Args:
        device: what it is for.
        config: its configuration.
        output: its directory.
        plan: why this configuration; saved as plan.json.
    """

    device: DeviceProfile
    config: QuantConfig
    output: Path
    plan: Plan | None = None


@dataclass(frozen=True)
class BundleResult:
    """A finished bundle.

    Args:
        target: what was asked for.
        bundle: the bundle, opened.
        state: "built"; "cached" where its engine came from the cache; "current" where nothing was to do.
        seconds: from the start of the build until it was complete.
    """

    target: Target
    bundle: Bundle
    state: Literal["built", "cached", "current"]
    seconds: float


def plan_targets(
    adapter: AdapterDescription,
    devices: Sequence[DeviceProfile],
    output: Path,
    request: PlanRequest,
    *,
    choice: tuple[QuantConfig, Plan | None] | None = None,
    archive: Archive | None = None,
) -> list[Target]:
    """Return a target for each device: its plan's configuration, or one that was chosen before.

    Args:
        adapter: what to plan with.
        devices: the targets' devices, each once.
        output: the bundle's directory; with several devices, the directory of their bundles.
        request: what is asked of the plans.
        choice: a configuration for all devices, and the plan it comes from; a plan's figures are saved with the bundle
            of its own device and adapter only.
        archive: measured configurations, see `coatrt.planning.planner.plan`.

    Raises:
        DeviceError: a device allows none of the adapter's formats.
        ConfigError: nothing keeps the limits.
    """
    places = [output if len(devices) == 1 else output / device.id for device in devices]
    if choice is None:
        plans = plan_fleet(adapter, devices, request, archive=archive)
        return [Target(*row) for row in zip(devices, [plan.config for plan in plans], places, plans, strict=True)]
    config, plan = choice
    origin = (plan.device, plan.adapter) if plan is not None else None
    return [
        Target(device, config, place, plan if (device.id, adapter.hash) == origin else None)
        for device, place in zip(devices, places, strict=True)
    ]
