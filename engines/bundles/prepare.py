"""What a build has to do, decided and checked before any of it is done; read without torch."""

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
    """One configuration: its graphs are written once, for every target that has it.

    Args:
        config: the configuration.
        targets: at least one.
    """

    config: QuantConfig
    targets: tuple[Target, ...]

    @property
    def rtx_devices(self) -> tuple[DeviceProfile, ...]:
        """One device of each compute capability that the job's one TensorRT-RTX engine must serve, by capability."""
        devices = [target.device for target in self.targets if target.device.builder == "tensorrt-rtx"]
        by_sm = {device.sm: device for device in devices}
        return tuple(by_sm[sm] for sm in sorted(by_sm))


@dataclass(frozen=True)
class Preparation:
    """A build that is ready to be executed.

    Args:
        targets: every bundle asked for, in order.
        options: see `BundleOptions`.
        fingerprints: by the place of each target, see `coatrt.engines.bundles.fingerprint`.
        current: results of the bundles that are up to date, by place.
        jobs: what is to do, one for each distinct configuration.
        sign: PEM file of the private key that signs the bundles; None for none.
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
    """Return what a build has to do; nothing is written.

    Args:
        adapter: the trained adapter.
        targets: what to make, every place once.
        options: see `BundleOptions`.
        overwrite: replace bundles that are there and are not current.
        sign: PEM file of the private key that signs them; a bundle that it has not signed is not current.

    Raises:
        FormatError: a device cannot run a format.
        ConfigError: a configuration does not fit the adapter, a place is in use, or the model has fewer positions than
            the context has.
    """
    adapter.spec.check_context(options.context)
    code, key = writers_hash(), None if sign is None else public_key(sign)
    fingerprints = {target.output: bundle_fingerprint(adapter.hash, target, options, code) for target in targets}
    if len(fingerprints) != len(targets):
        raise ConfigError(f"{len(targets)} bundles have {len(fingerprints)} output directories; give each its own")
    _check_places([target.output.absolute() for target in targets])
    current: dict[Path, BundleResult] = {}
    by_config: dict[str, list[Target]] = {}
    for target in targets:
        sweep(target.output.parent)
        _check_formats(adapter, target.config)
        check_formats(target.config, target.device, options.activations)
        found = current_bundle(target.output, fingerprints[target.output], key) if adapter.hash else None
        if found is not None:
            current[target.output] = BundleResult(target, found, "current", 0.0)
            continue
        check_output(target.output, overwrite)
        by_config.setdefault(target.config.hash, []).append(target)
    jobs = tuple(Job(members[0].config, tuple(members)) for members in by_config.values())
    return Preparation(tuple(targets), options, fingerprints, current, jobs, sign)


def _check_places(places: Sequence[Path]) -> None:
    """Refuse a bundle inside another one, of this build or of an earlier one."""
    for place in places:
        for parent in place.parents:
            if parent in places or holds_bundle(parent):
                raise ConfigError(f"{place} lies inside the bundle {parent}; give a directory outside")


def _check_formats(adapter: AdapterDescription, config: QuantConfig) -> None:
    """Refuse a configuration that the adapter does not serve."""
    for tensor in adapter.contract.tensors:
        fmt = config.formats.get(tensor.matrix)
        if fmt not in adapter.formats:
            raise ConfigError(
                f"{tensor.matrix} is {fmt or 'not in the configuration'}, which the adapter was not trained for; "
                f"allowed: {', '.join(map(str, adapter.formats))}"
            )
