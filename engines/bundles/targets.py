"""Targets of a build and their results; importable without torch."""

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
    """A bundle to build.

    Args:
        device: the device it is for.
        config: its configuration.
        output: its directory.
        plan: the plan of the configuration, saved as plan.json; None if it was not planned.
    """

    device: DeviceProfile
    config: QuantConfig
    output: Path
    plan: Plan | None = None


@dataclass(frozen=True)
class BundleResult:
    """A finished bundle.

    Args:
        target: its target.
        bundle: the opened bundle.
        state: "built"; "cached" if its engine came from the cache; "current" if it was up to date.
        seconds: time from the start of the build until the bundle was complete.
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
    """Return a target for each device, with a planned configuration or a given one.

    Args:
        adapter: the adapter to plan with.
        devices: the targets' devices; they must differ.
        output: the bundle's directory; with several devices, the parent directory of their bundles.
        request: requirements of the plans.
        choice: a configuration for all devices and the plan it comes from; the plan is saved only with the bundle of
            its own device and adapter. None plans a configuration for each device.
        archive: measured configurations, see `coatrt.planning.planner.plan`.

    Raises:
        DeviceError: a device supports none of the adapter's formats.
        ConfigError: no configuration meets the limits.
    """
    outputs = [output if len(devices) == 1 else output / device.id for device in devices]
    if choice is None:
        plans = plan_fleet(adapter, devices, request, archive=archive)
        return [Target(*row) for row in zip(devices, [plan.config for plan in plans], outputs, plans, strict=True)]
    config, plan = choice
    origin = (plan.device, plan.adapter) if plan is not None else None
    return [
        Target(device, config, directory, plan if (device.id, adapter.hash) == origin else None)
        for device, directory in zip(devices, outputs, strict=True)
    ]
