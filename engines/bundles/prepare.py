"""Decides and checks what a build has to do, before it does anything; importable without torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coatrt.adapter.description import AdapterDescription
from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import DeviceProfile
from coatrt.engines.builders.builder import check_formats
from coatrt.engines.bundles.destination import check_output, holds_bundle
from coatrt.engines.bundles.fingerprint import bundle_fingerprint, current_bundle, writers_hash
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.targets import BundleResult, Target
from coatrt.errors import ConfigError
from coatrt.system.scratch import sweep
from coatrt.system.signature import public_key

__all__ = ["Job", "Preparation", "prepare"]


@dataclass(frozen=True)
class Job:
    """One configuration, whose graphs are written once for all its targets.

    Args:
        config: the configuration.
        targets: the targets with this configuration, at least one.
    """

    config: QuantConfig
    targets: tuple[Target, ...]

    @property
    def rtx_devices(self) -> tuple[DeviceProfile, ...]:
        """One device per compute capability that the job's TensorRT-RTX engine has to run on, in ascending order."""
        devices = [target.device for target in self.targets if target.device.builder == "tensorrt-rtx"]
        by_sm = {device.sm: device for device in devices}
        return tuple(by_sm[sm] for sm in sorted(by_sm))


@dataclass(frozen=True)
class Preparation:
    """A build that is ready to be executed.

    Args:
        targets: every target of the build, in order.
        options: see `BundleOptions`.
        fingerprints: output directory → fingerprint, see `coatrt.engines.bundles.fingerprint`.
        current: output directory → result, for the bundles that are up to date.
        jobs: the remaining work, one job per distinct configuration.
        sign: PEM file of the private key to sign with; None for unsigned bundles.
    """

    targets: tuple[Target, ...]
    options: BundleOptions
    fingerprints: Mapping[Path, str]
    current: Mapping[Path, BundleResult]
    jobs: tuple[Job, ...]
    sign: str | Path | None = None


def prepare(
    adapter: AdapterDescription,
    targets: Sequence[Target],
    options: BundleOptions,
    *,
    overwrite: bool = False,
    sign: str | Path | None = None,
) -> Preparation:
    """Return what a build has to do, without writing anything.

    Args:
        adapter: the trained adapter.
        targets: the bundles to build; their output directories must differ.
        options: see `BundleOptions`.
        overwrite: replace bundles that exist and are out of date.
        sign: PEM file of the private key to sign with; a bundle without its signature is out of date.

    Raises:
        FormatError: a device cannot run a format.
        ConfigError: a configuration does not fit the adapter, an output directory is in use, or the context exceeds the
            model's positions.
    """
    adapter.spec.check_context(options.context)
    code, key = writers_hash(), None if sign is None else public_key(sign)
    fingerprints = {target.output: bundle_fingerprint(adapter.hash, target, options, code) for target in targets}
    if len(fingerprints) != len(targets):
        raise ConfigError(f"{len(targets)} bundles have only {len(fingerprints)} output directories; give each its own")
    _check_outputs([target.output.absolute() for target in targets])
    current: dict[Path, BundleResult] = {}
    by_config: dict[str, list[Target]] = {}
    for target in targets:
        sweep(target.output.parent)
        _check_formats(adapter, target.config)
        check_formats(target.config, target.device, options.activations)
        bundle = current_bundle(target.output, fingerprints[target.output], key) if adapter.hash else None
        if bundle is not None:
            current[target.output] = BundleResult(target, bundle, "current", 0.0)
            continue
        check_output(target.output, overwrite)
        by_config.setdefault(target.config.hash, []).append(target)
    jobs = tuple(Job(members[0].config, tuple(members)) for members in by_config.values())
    return Preparation(tuple(targets), options, fingerprints, current, jobs, sign)


def _check_outputs(outputs: Sequence[Path]) -> None:
    """Refuse an output directory inside another bundle, of this build or an earlier one."""
    for output in outputs:
        for parent in output.parents:
            if parent in outputs or holds_bundle(parent):
                raise ConfigError(f"{output} lies inside the bundle {parent}; give a directory outside")


def _check_formats(adapter: AdapterDescription, config: QuantConfig) -> None:
    """Refuse a configuration with a format the adapter was not trained for."""
    for tensor in adapter.contract.tensors:
        fmt = config.formats.get(tensor.matrix)
        if fmt not in adapter.formats:
            problem = f"is {fmt}, which the adapter was not trained for" if fmt else "has no format"
            allowed = ", ".join(map(str, adapter.formats))
            raise ConfigError(f"{tensor.matrix} {problem}; allowed: {allowed}")
