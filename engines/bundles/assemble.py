"""Adapter + configuration + device → bundle: graphs, hypernetwork, emitted LoRA, engine, tokenizer, manifest."""

from collections.abc import Callable, Iterable
from pathlib import Path

from coatrt.adapter.adapter import Adapter
from coatrt.bundle import Bundle
from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import DeviceProfile
from coatrt.engines.bundles.build import Target, build_fleet
from coatrt.engines.bundles.options import BundleOptions
from coatrt.models.checkpoint import Checkpoint
from coatrt.planning.planner import Plan
from coatrt.quantization.code_cache import CodeStore
from coatrt.system.progress import Progress, silent

__all__ = ["BundleOptions", "assemble"]


def assemble(
    adapter: Adapter,
    checkpoint: Checkpoint,
    config: QuantConfig,
    device: DeviceProfile,
    output: str | Path,
    options: BundleOptions | None = None,
    *,
    also: Iterable[DeviceProfile] = (),
    plan: Plan | None = None,
    codes: CodeStore | None = None,
    progress: Progress = silent,
    tell: Callable[[str], None] | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Make the bundle of one configuration for a device, see `coatrt.engines.bundles.build.build_fleet` for several.

    Args:
        adapter: the trained adapter.
        checkpoint: its model.
        config: the configuration.
        device: the target.
        output: the directory to write.
        options: see `BundleOptions`.
        also: further devices that the same engine must serve.
        plan: why this configuration; kept as plan.json.
        codes: cache of encoded matrices.
        progress: called after every matrix.
        tell: called with a line for the user.
        overwrite: replace a bundle that is there already.

    Raises:
        FormatError: a device cannot run a format.
        BuildError: the builder is not installed or refuses the graph.
        ConfigError: the configuration does not fit, or `output` is in use.
    """
    target = Target(device, config, Path(output), plan, tuple(also))
    (made,) = build_fleet(
        adapter, checkpoint, [target], options, codes=codes, overwrite=overwrite, progress=progress, tell=tell
    )
    return made.bundle
