"""What a report shows, gathered from adapters, bundles and what was measured of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from coatrt.adapter.description import AdapterDescription
from coatrt.bundle import MANIFEST, Bundle, SignaturePolicy
from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import device_profile
from coatrt.errors import BundleError, ConfigError
from coatrt.models.matrices import ModelMatrices
from coatrt.planning.archive import adapter_archive
from coatrt.planning.plan import Plan, PlanRequest
from coatrt.planning.planner import plan_fleet
from coatrt.reporting.measured import Bench, Quality, find_bench, find_quality
from coatrt.system.files import sha256_file
from coatrt.system.json_data import convert, read_as
from coatrt.system.ranges import Whole

__all__ = ["Entry", "Report", "Trained", "collect"]

_AGAIN = "build the bundle again"
_SIGNED = {True: "made by the key given", False: "not made by the key given"}


class _Device(TypedDict):
    """What the page shows of a bundle's device."""

    name: str
    sm: NotRequired[Whole | None]
    sources: NotRequired[list[str]]


@dataclass(frozen=True)
class Entry:
    """One configuration for one device: that of a bundle, or a plan.

    Args:
        title: the folder of the bundle, or the id of the device.
        device: the device's JSON.
        model: its matrices.
        config: the configuration.
        plan: JSON of the plan, empty where a bundle has none.
        engine_bytes: of the engine, None where there is none.
        bundled: whether it is that of a bundle.
        provenance: (what, value) for the table at the end.
        quality: as measured, None where it was not.
        bench: of the bundle, None where it was not run.
    """

    title: str
    device: Mapping[str, Any]
    model: ModelMatrices
    config: QuantConfig
    plan: Mapping[str, Any]
    engine_bytes: int | None = None
    bundled: bool = False
    provenance: tuple[tuple[str, str], ...] = ()
    quality: Quality | None = None
    bench: Bench | None = None

    @property
    def bits(self) -> float:
        """Average bits per weight, scales included."""
        return self.config.average_bits(self.model)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens per second of each sequence with the LoRA, None where the bundle was not timed on its device."""
        if self.bench is None:
            return None
        backend, machine = self.bench["backend"], self.bench["environment"]
        cpu = self.device["sm"] == 0
        here = backend["backend"] == "ort" if cpu else self.device["name"] in machine["gpus"]
        if not here or (not cpu and backend["backend"] == "ort"):
            return None
        return next((row["tokens_per_s"] / backend["batch"] for row in self.bench["decode"] if row["lora"]), None)


@dataclass(frozen=True)
class Trained:
    """An adapter: how it was trained, and what was measured of it.

    Args:
        name: of its directory.
        hash: of the adapter.
        steps: of the training.
        seconds: of the training.
        budgets: (bits per weight, hash of the configuration, quality) of each budget that training measured.
        searched: (bits per weight, loss with the LoRA, hash) of the measured configurations that none beats.
        facts: (what, value) for the table at the end.
    """

    name: str
    hash: str
    steps: int
    seconds: float
    budgets: tuple[tuple[float, str, Quality], ...] = ()
    searched: tuple[tuple[float, float, str], ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    Args:
        source: path or name of the model.
        entries: configurations, those of bundles and the planned ones.
        trained: the adapters.
        versions: package → version.
        notes: measurements that are left out, and why.
        title: what to call the model; empty: by its source.
    """

    source: str
    entries: tuple[Entry, ...]
    trained: tuple[Trained, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    title: str = ""


def collect(
    paths: Sequence[Path],
    devices: Sequence[str],
    request: PlanRequest,
    key: str | Path | bytes | None = None,
    policy: SignaturePolicy | None = None,
    title: str = "",
) -> Report:
    """Return the report of some adapters and bundles.

    A directory of bundles stands for those in it. Every bundle is an entry; an adapter is planned for each device that
    no bundle has the same configuration for. For the arguments see `coatrt.reporting.write.report`.

    Raises:
        ConfigError: a path is none of these, they belong to several models, there is nothing to show, no bundle where a
            key is given, or a file of measurements is damaged.
        CheckpointError, BundleError: one is damaged, or not signed by the key.
    """
    sources: dict[str, str] = {}  # fingerprint → model
    planned: list[Entry] = []
    bundled: list[Entry] = []
    trained: list[Trained] = []
    versions: dict[str, str] = {}
    notes: list[str] = []
    for path in paths:
        if (path / "adapter.json").is_file():
            facts = AdapterDescription.load(path)
            sources.setdefault(facts.fingerprint, facts.source)
            planned += _planned(path, facts, devices, request)
            trained.append(_trained(path, facts))
            continue
        for place in _bundles(path):
            bundle = Bundle.open(place, key=key, policy=policy)
            sources.setdefault(bundle.manifest["model"]["fingerprint"], bundle.manifest["model"]["source"])
            versions |= bundle.manifest["versions"]
            entry, left_out = _bundled(place, bundle)
            bundled.append(entry)
            notes += left_out
    if (key is not None or policy not in (None, "off")) and not bundled:
        raise ConfigError("a key or signature policy is given and no bundle; adapters are not signed: give bundles too")
    same = {(entry.device.get("id"), entry.config) for entry in bundled}
    entries = bundled + [entry for entry in planned if (entry.device.get("id"), entry.config) not in same]
    if not entries:
        raise ConfigError("nothing to show; give a bundle, or an adapter and --target")
    if len(sources) > 1:
        names = " and ".join(list(sources.values())[:2])
        raise ConfigError(f"the paths belong to different models, {names}; write a report for each")
    (source,) = sources.values()
    measured = _measured_anywhere(entries, trained)
    return Report(source, tuple(measured), tuple(trained), versions, tuple(notes), title)


def _bundles(path: Path) -> list[Path]:
    found = [path] if (path / MANIFEST).is_file() else sorted(part.parent for part in path.glob(f"*/{MANIFEST}"))
    if not found:
        raise ConfigError(
            f"not an adapter, a bundle or a directory of bundles: {path}; give what coatrt train or build wrote"
        )
    return found


def _measured_anywhere(entries: Iterable[Entry], trained: Iterable[Trained]) -> list[Entry]:
    """Return entries with the quality of the same configuration of the same adapter, wherever it was measured."""
    entries, known = list(entries), {}
    for adapter in trained:
        known.update({(hash, adapter.hash): quality for _, hash, quality in adapter.budgets})
    for entry in entries:
        if entry.quality is not None and entry.plan.get("adapter"):
            known[entry.config.hash, entry.plan["adapter"]] = entry.quality
    return [
        replace(entry, quality=entry.quality or known.get((entry.config.hash, entry.plan.get("adapter", ""))))
        for entry in entries
    ]


def _planned(path: Path, facts: AdapterDescription, devices: Sequence[str], request: PlanRequest) -> list[Entry]:
    profiles = [device_profile(name) for name in devices]
    plans = plan_fleet(facts, profiles, request, archive=adapter_archive(path))
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


def _bundled(place: Path, bundle: Bundle) -> tuple[Entry, list[str]]:
    """Return the entry of a bundle, and which measurements beside it are left out."""
    manifest, plan = bundle.manifest, {}
    if "plan.json" in manifest["files"]:
        value = read_as(bundle.path("plan.json"), object, "plan", _AGAIN, BundleError)
        plan = Plan.from_json(value, bundle.model_matrices, f"plan {place / 'plan.json'}").to_json()
    where = f"device in {place / MANIFEST}"
    device = convert(manifest.get("device", {}), _Device, where, _AGAIN, BundleError)
    device_id = manifest.get("device", {}).get("id")
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
    (quality, stale), (bench, other) = find_quality(bundle), find_bench(bundle)
    entry = Entry(
        title=place.absolute().name,
        device={"sm": None, "id": device_id, **device},
        model=bundle.model_matrices,
        config=bundle.config,
        plan=plan,
        engine_bytes=engines[0]["bytes"] if engines else None,
        bundled=True,
        provenance=tuple(provenance),
        quality=quality,
        bench=bench,
    )
    return entry, [note for note in (stale, other) if note]


def _trained(path: Path, facts: AdapterDescription) -> Trained:
    metrics, archive = facts.metrics, adapter_archive(path)
    options, held_out = metrics["options"], metrics["held_out"]

    def quality(row: Mapping[str, Any]) -> Quality:
        keys = ((held_out, "full_precision"), (row, "without"), (row, "adapted"))
        scores = [
            {"loss": values[key]} | ({"accuracy": values[f"{key}_accuracy"]} if f"{key}_accuracy" in values else {})
            for values, key in keys
        ]
        counts = {"examples": metrics["held_out_examples"], "tokens": metrics["held_out_tokens"]}
        names = dict(zip(("base", "quantized", "adapted"), scores, strict=True))
        where = f"training metrics {path / 'metrics.json'}"
        return convert({"task": metrics["task"], **counts, **names}, Quality, where, "train again")

    names = ("task", "quantizer", "preset", "rank", "steps", "batch", "max_length", "seed")
    shown = {**options, "task": metrics["task"]}
    return Trained(
        name=path.absolute().name,
        hash=facts.hash,
        steps=len(metrics["losses"]),
        seconds=metrics["seconds"],
        budgets=tuple((row["bits"], row["configuration"], quality(row)) for row in held_out["budgets"]),
        searched=tuple(
            (point.config.average_bits(facts.model), point.loss, point.config.hash)
            for point in (archive.front() if archive is not None else ())
        ),
        facts=(
            ("hash", facts.hash),
            ("formats", ", ".join(map(str, facts.formats))),
            *((name, str(shown[name])) for name in names),
            ("seconds", f"{metrics['seconds']:.0f}"),
        ),
    )
