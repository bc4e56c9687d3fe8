"""What a report shows, gathered from adapters and bundles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from coatrt.adapter.description import AdapterDescription
from coatrt.bundle import MANIFEST, Bundle, SignaturePolicy
from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import device_profile
from coatrt.errors import BundleError, ConfigError
from coatrt.models.matrices import ModelMatrices
from coatrt.planning.archive import Archive, adapter_archive
from coatrt.planning.plan import Plan, PlanRequest
from coatrt.planning.planner import plan_fleet
from coatrt.system.files import sha256_file
from coatrt.system.json_data import convert, read_as
from coatrt.system.ranges import Whole

__all__ = ["Entry", "Report", "collect"]

_AGAIN = "build the bundle again"
_SIGNED = {True: "made by the key given", False: "not made by the key given"}


class _Device(TypedDict):
    """What the page shows of a bundle's device."""

    name: str
    sm: NotRequired[Whole | None]
    sources: NotRequired[list[str]]


@dataclass(frozen=True)
class Entry:
    """One configuration for one device.

    Args:
        title: what it is called in figures.
        device: the device's JSON.
        model: its matrices.
        config: the configuration.
        plan: JSON of the plan, empty where a bundle has none.
        engine_bytes: of the engine, None where there is none.
        bundled: whether it is that of a bundle.
        provenance: (what, value) for the table at the end.
    """

    title: str
    device: Mapping[str, Any]
    model: ModelMatrices
    config: QuantConfig
    plan: Mapping[str, Any]
    engine_bytes: int | None = None
    bundled: bool = False
    provenance: tuple[tuple[str, str], ...] = ()

    @property
    def bits(self) -> float:
        """Average bits per weight, scales included."""
        return self.config.average_bits(self.model)


@dataclass(frozen=True)
class Measured:
    """A loss measured on held-out data.

    Args:
        what: what was measured.
        bits: bits per weight.
        loss: nats per token.
        accuracy: share of right answers, None where the task has none.
        configuration: hash of the configuration, empty where `what` says it.
    """

    what: str
    bits: float
    loss: float
    accuracy: float | None = None
    configuration: str = ""


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    Args:
        source: the model.
        entries: configurations, the planned ones and those of bundles.
        quality: held-out losses.
        training: (what, value) of the adapters.
        versions: package → version.
    """

    source: str
    entries: tuple[Entry, ...]
    quality: tuple[Measured, ...] = ()
    training: tuple[tuple[str, str], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def collect(
    paths: Sequence[Path],
    devices: Sequence[str],
    request: PlanRequest,
    key: str | Path | bytes | None = None,
    policy: SignaturePolicy | None = None,
) -> Report:
    """Return the report of some adapters and bundles.

    A directory of bundles stands for those in it. Every bundle is an entry; an adapter is planned for each device. For
    the arguments see `coatrt.reporting.write.report`.

    Raises:
        ConfigError: a path is none of these, there is nothing to show, or no bundle where a key is given.
        CheckpointError, BundleError: one is damaged, or not signed by the key.
    """
    sources: list[str] = []
    entries: list[Entry] = []
    quality: list[Measured] = []
    training: list[tuple[str, str]] = []
    versions: dict[str, str] = {}
    for path in paths:
        if (path / "adapter.json").is_file():
            facts, archive = AdapterDescription.load(path), adapter_archive(path)
            sources.append(facts.source)
            entries += _planned(facts, archive, devices, request)
            quality += _losses(path.name, facts, archive)
            training += _training(path, facts)
            continue
        found = [path] if (path / MANIFEST).is_file() else sorted(part.parent for part in path.glob(f"*/{MANIFEST}"))
        if not found:
            raise ConfigError(
                f"{path} is no adapter, no bundle and no directory of bundles; give what coatrt train or build wrote"
            )
        for place in found:
            bundle = Bundle.open(place, key=key, policy=policy)
            sources.append(str(bundle.manifest["model"]["source"]))
            versions |= bundle.manifest["versions"]
            entries.append(_bundled(place, bundle))
    if (key is not None or policy not in (None, "off")) and not any(entry.bundled for entry in entries):
        raise ConfigError("a key or signature policy is given and no bundle; adapters are not signed: give bundles too")
    if not entries:
        raise ConfigError("nothing to show; give a bundle, or an adapter and --target")
    for entry in entries:
        if entry.plan.get("measured_loss") is not None:
            quality.append(Measured(f"{entry.title}: with its LoRA", entry.bits, entry.plan["measured_loss"]))
    return Report(sources[0], tuple(entries), tuple(quality), tuple(training), versions)


def _planned(
    facts: AdapterDescription, archive: Archive | None, devices: Sequence[str], request: PlanRequest
) -> list[Entry]:
    profiles = [device_profile(name) for name in devices]
    plans = plan_fleet(facts, profiles, request, archive=archive)
    return [
        Entry(
            plan.device,
            profile.to_json(),
            facts.model,
            plan.config,
            plan.to_json(),
            provenance=(("adapter", facts.hash), ("configuration", plan.config.hash)),
        )
        for profile, plan in zip(profiles, plans, strict=True)
    ]


def _bundled(place: Path, bundle: Bundle) -> Entry:
    manifest, plan = bundle.manifest, {}
    if "plan.json" in manifest["files"]:
        value = read_as(bundle.path("plan.json"), object, "plan", _AGAIN, BundleError)
        plan = Plan.from_json(value, bundle.model_matrices, f"plan {place / 'plan.json'}").to_json()
    where = f"device in {place / MANIFEST}"
    device = convert(manifest.get("device", {}), _Device, where, _AGAIN, BundleError)
    engines = manifest["engines"]

    def digest(name: str) -> str:
        if name not in manifest["files"]:
            raise BundleError(f"{place} has no file {name}; {_AGAIN}")
        return manifest["files"][name]["sha256"][:16]

    provenance = [
        ("manifest", sha256_file(place / MANIFEST)[:16]),
        ("configuration", manifest["configuration"]["hash"]),
        ("model", manifest["model"]["fingerprint"]),
        ("weights", digest("weights.bin")),
        *((("signature", _SIGNED[bundle.signed]),) if bundle.signed is not None else ()),
    ]
    provenance += [
        (engine["file"], f"{engine['builder']} {engine['version']}, {digest(engine['file'])}") for engine in engines
    ]
    size = engines[0]["bytes"] if engines else None
    return Entry(
        place.name, {"sm": None, **device}, bundle.model_matrices, bundle.config, plan, size, True, tuple(provenance)
    )


def _losses(name: str, facts: AdapterDescription, archive: Archive | None) -> list[Measured]:
    """Return the held-out losses that training measured, then those of the search's front."""
    held_out = facts.metrics["held_out"]
    measured = [("full_precision", 16.0, held_out)]
    measured += [(key, row["bits"], row) for row in held_out["budgets"] for key in ("without", "adapted")]
    rows = [
        Measured(f"{name}: {key.replace('_', ' ')}", bits, row[key], row.get(f"{key}_accuracy"))
        for key, bits, row in measured
    ]
    if archive is not None:
        for point in archive.front():
            rows.append(Measured(f"{name}: searched", archive.bits(point), point.loss, configuration=point.config.hash))
    return rows


def _training(path: Path, facts: AdapterDescription) -> list[tuple[str, str]]:
    options = facts.metrics["options"]
    names = ("quantizer", "preset", "rank", "steps", "batch", "max_length", "seed")
    return [
        ("adapter", f"{path.name}, hash {facts.hash}"),
        ("formats", ", ".join(map(str, facts.formats))),
        *((name, str(options[name])) for name in names),
        ("trained for", f"{facts.metrics['seconds']:.0f} s"),
    ]
