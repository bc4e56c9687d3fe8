"""What a report shows, gathered from adapters and bundles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coatrt.adapter.description import AdapterDescription
from coatrt.bundle import MANIFEST, Bundle
from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import device_profile
from coatrt.errors import ConfigError
from coatrt.models.matrices import ModelMatrices
from coatrt.planning.archive import Archive, adapter_archive
from coatrt.planning.plan import PlanRequest
from coatrt.planning.planner import plan_fleet
from coatrt.system.files import sha256_file
from coatrt.system.json_data import read_as

__all__ = ["Entry", "Report", "collect"]


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
        provenance: (what, value) for the table at the end.
    """

    title: str
    device: Mapping[str, Any]
    model: ModelMatrices
    config: QuantConfig
    plan: Mapping[str, Any]
    engine_bytes: int | None = None
    provenance: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    Args:
        source: the model.
        entries: configurations, the planned ones and those of bundles.
        archives: name → measured configurations.
        quality: rows (what, bits per weight or None, loss) of held-out losses.
        training: (what, value) of the adapters.
        versions: package → version.
    """

    source: str
    entries: tuple[Entry, ...]
    archives: Mapping[str, Archive] = field(default_factory=dict)
    quality: tuple[tuple[str, float | None, float], ...] = ()
    training: tuple[tuple[str, str], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def collect(paths: Sequence[Path], devices: Sequence[str], request: PlanRequest) -> Report:
    """Return the report of some adapters and bundles.

    A directory of bundles stands for those in it. Every bundle is an entry; an adapter is planned for each device.

    Args:
        paths: adapters, bundles and directories of bundles.
        devices: ids that adapters are planned for.
        request: what the plans are asked.

    Raises:
        ConfigError: a path is none of these, or there is nothing to show.
        CheckpointError, BundleError: one is damaged.
    """
    entries: list[Entry] = []
    archives: dict[str, Archive] = {}
    quality: list[tuple[str, float | None, float]] = []
    training: list[tuple[str, str]] = []
    versions: dict[str, str] = {}
    source = ""
    for path in paths:
        if (path / "adapter.json").is_file():
            facts = AdapterDescription.load(path)
            source = source or facts.source
            archive = adapter_archive(path)
            if archive is not None:
                archives[path.name] = archive
            entries += _planned(facts, archive, devices, request)
            quality += _losses(path.name, facts)
            training += _training(path, facts)
            continue
        found = [path] if (path / MANIFEST).is_file() else sorted(part.parent for part in path.glob(f"*/{MANIFEST}"))
        if not found:
            raise ConfigError(
                f"{path} is no adapter, no bundle and no directory of bundles; give what coatrt train or build wrote"
            )
        for place in found:
            bundle = Bundle.open(place)
            source = source or str(bundle.manifest["model"]["source"])
            versions |= bundle.manifest["versions"]
            entries.append(_bundled(place, bundle))
    if not entries:
        raise ConfigError("nothing to show; give a bundle, or an adapter and --target")
    return Report(source, tuple(entries), archives, tuple(quality), tuple(training), versions)


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
    manifest = bundle.manifest
    planned = "plan.json" in manifest["files"]
    plan = read_as(bundle.path("plan.json"), dict[str, Any], "plan", "build the bundle again") if planned else {}
    engines = manifest["engines"]
    provenance = [
        ("manifest", sha256_file(place / MANIFEST)[:16]),
        ("configuration", manifest["configuration"]["hash"]),
        ("model", manifest["model"]["fingerprint"]),
        ("weights", manifest["files"]["weights.bin"]["sha256"][:16]),
    ]
    provenance += [
        (engine["file"], f"{engine['builder']} {engine['version']}, {manifest['files'][engine['file']]['sha256'][:16]}")
        for engine in engines
    ]
    size = engines[0]["bytes"] if engines else None
    return Entry(place.name, manifest["device"], bundle.model_matrices, bundle.config, plan, size, tuple(provenance))


def _losses(name: str, facts: AdapterDescription) -> list[tuple[str, float | None, float]]:
    """Return the held-out losses that training measured."""
    found = facts.metrics.get("held_out") or {}
    rows: list[tuple[str, float | None, float]] = []
    for key, value in found.items():
        if isinstance(value, (int, float)):
            rows.append((f"{name}: {key.replace('_', ' ')}", 16.0 if key == "full_precision" else None, float(value)))
    for row in found.get("budgets", ()):
        bits = row.get("bits")
        for key, value in row.items():
            if key not in ("bits", "configuration", "hash") and isinstance(value, (int, float)):
                rows.append((f"{name}: {key.replace('_', ' ')}", bits, float(value)))
    return rows


def _training(path: Path, facts: AdapterDescription) -> list[tuple[str, str]]:
    options = facts.metrics.get("options", {})
    rows = [("adapter", f"{path.name}, hash {facts.hash}"), ("formats", ", ".join(map(str, facts.formats)))]
    for key in ("quantizer", "preset", "rank", "steps", "batch", "max_length", "seed"):
        if key in options:
            rows.append((key, str(options[key])))
    if "seconds" in facts.metrics:
        rows.append(("trained for", f"{float(facts.metrics['seconds']):.0f} s"))
    return rows
