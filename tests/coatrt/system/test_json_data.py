"""Every kind of JSON file that coatrt reads: what is wrong with one is one line that names the file and the place."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from coatrt.adapter.adapter import Adapter
from coatrt.adapter.description import AdapterDescription
from coatrt.bundle import Bundle, seal
from coatrt.configs.config import QuantConfig
from coatrt.devices.profiles import device_profile
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.runtime.emitter import Emitter
from coatrt.errors import CoatError, ConfigError
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.spec import DecoderSpec
from coatrt.planning import planner
from coatrt.planning.archive import Archive, ArchiveEntry
from coatrt.planning.measured_latency import MeasuredLatency, Product, Rest
from coatrt.planning.plan import read_choice
from coatrt.system.files import sha256_file
from coatrt.system.json_data import dump_json, parse_json, read_as, to_data, write_json
from coatrt.training.resume_state import check_state
from support.bundles import make_bundle
from support.seals import alter_sealed, seal_text


@dataclass(frozen=True)
class Kind:
    """A kind of file: `read` reads the one that lies in a directory under `name`.

    `number` is the place of one number in it, `key` of one key that must be there, each as keys and indices;
    `closed` is the place of an object in which an unknown key is refused.
    """

    name: str
    read: Callable[[Path], object]
    number: tuple[Any, ...] = ()
    key: tuple[Any, ...] = ()
    closed: tuple[Any, ...] | None = None


def adapter(directory: Path) -> AdapterDescription:
    facts = directory / "adapter.json"
    try:
        hashes = {name: sha256_file(directory / name) for name in json.loads(facts.read_text())["sha256"]}
        alter_sealed(facts, lambda whole: whole.update(sha256=hashes))  # as someone who alters a file would
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # adapter.json itself is the garbled one
    return AdapterDescription.load(directory)


def bundle(directory: Path) -> Bundle:
    seal(directory, _facts(directory))
    return Bundle.open(directory)


MODEL = SimpleNamespace()  # filled by `valid`
KINDS = {
    "configuration": Kind("c.json", lambda d: QuantConfig.load(d / "c.json", MODEL.matrices), closed=()),
    "plan": Kind(
        "plan.json",
        lambda d: read_choice(d / "plan.json", MODEL.matrices),
        ("bytes_per_token",),
        ("binds",),
        ("request",),
    ),
    "adapter": Kind("adapter.json", adapter, ("description", "spec", "layers"), ("description", "fingerprint")),
    "sensitivities": Kind("sensitivity.json", adapter, key=("errors",)),
    "metrics": Kind("metrics.json", adapter, ("dropped",), ("task",)),
    "archive": Kind("archive.json", lambda d: Archive.load(d / "archive.json"), ("rows", 0, 0), ("identity",)),
    "timings": Kind("cpu.json", lambda d: MeasuredLatency.load(d / "cpu.json"), ("products", 0, "K"), ("device",)),
    "manifest": Kind(
        "manifest.json", Bundle.open, ("decoders", "cpu", "io", "layers"), ("decoders", "cpu", "io", "vocabulary")
    ),
    "LoRA contract": Kind("lora_io.json", lambda d: bundle(d).contract, ("tensors", 0, "rank"), ("alpha",)),
    "hypernetwork": Kind("hypernet.json", lambda d: Emitter.of(bundle(d)), key=("formats",)),
    "bundle's configuration": Kind("configuration.json", lambda d: bundle(d).config, closed=()),
    "run": Kind("run.json", lambda d: check_state(d, "me")),
    "model": Kind("config.json", Checkpoint.open),
    "shards": Kind("model.safetensors.index.json", Checkpoint.open, key=("weight_map",)),
}


@pytest.fixture(scope="module")
def valid(tiny_adapter: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one of each kind."""
    loaded = Adapter.from_pretrained(tiny_adapter)
    place = tmp_path_factory.mktemp("files")
    profile = device_profile("rtx-4090")
    plan = planner.plan(loaded.description, profile, bits=5.2, context=96, prefill=32)
    make_bundle(loaded, plan.config, profile.id, place / "b", BundleOptions(context=96, engine=False), plan=plan)
    MODEL.matrices = loaded.description.model
    for name in ("plan", "timings", "archive", "run", "configuration"):
        (place / name).mkdir()
    write_json(place / "plan" / "plan.json", plan.to_json())
    plan.config.save(place / "configuration" / "c.json")
    made = MeasuredLatency("cpu", "ort 1", {}, (Product(4, 4, "int8", 1, 1.0),), (Rest((1,), 1, 1, 1.0),))
    write_json(place / "timings" / "cpu.json", made, sealed=True)
    Archive(1000, place / "archive" / "archive.json", "me").add(ArchiveEntry(plan.config, 100, 1.5))
    write_json(place / "run" / "run.json", {"run": "me"}, sealed=True)
    for name in ("manifest", "LoRA contract", "hypernetwork", "bundle's configuration"):
        shutil.copytree(place / "b", place / name)
    for name in ("adapter", "sensitivities", "metrics"):
        shutil.copytree(tiny_adapter, place / name)
    for name in ("model", "shards"):
        shutil.copytree(tiny_llama, place / name)
    shard = place / "shards" / "model-00001-of-00001.safetensors"  # beside a whole model.safetensors no index counts
    (place / "shards" / "model.safetensors").rename(shard)
    shards = {"weight_map": dict.fromkeys(load_file(shard), shard.name)}
    write_json(place / "shards" / "model.safetensors.index.json", shards)
    return place


@pytest.fixture(params=KINDS)
def given(request: pytest.FixtureRequest, valid: Path, tmp_path: Path) -> tuple[Kind, Path]:
    """A kind and a copy of a directory with a valid file of it."""
    return KINDS[request.param], Path(shutil.copytree(valid / request.param, tmp_path / "d"))


def refused(kind: Kind, directory: Path) -> str:
    """Return the line that refuses a file; it must name the file."""
    with pytest.raises(CoatError) as caught:
        kind.read(directory)
    said = str(caught.value)
    assert "\n" not in said
    assert kind.name in said, said
    assert "; " in said, "it says nothing of what to do"
    return said


def altered(directory: Path, kind: Kind, place: tuple[Any, ...], change: Callable[[Any, Any], None]) -> None:
    """Apply `change` to (container, key) of a place in the file; its seal is renewed."""
    whole = json.loads((directory / kind.name).read_text())
    inner = whole
    for step in place[:-1]:
        inner = inner[step]
    change(inner, place[-1])
    put(directory, kind, json.dumps(whole))


def put(directory: Path, kind: Kind, text: str) -> None:
    """Write a text in the place of a file; its seal, where it had one, is renewed."""
    path = directory / kind.name
    try:
        value = json.loads(text) if path.read_text().startswith('{\n "seal"') else None
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and value:
        path.write_text(seal_text(json.dumps({key: value[key] for key in value if key != "seal"})))
    else:
        path.write_text(seal_text(text) if path.read_text().startswith('{\n "seal"') else text)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "\0",
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        f'{{"a": {"9" * 5000}}}',
        "[" * 100_000,
        f"{'[' * 100_000}{']' * 100_000}",
        '{"a": ' * 100_000,
    ],
    ids=lambda text: text[:12],
)
def test_what_is_no_json_is_refused(given: tuple[Kind, Path], text: str) -> None:
    kind, directory = given
    put(directory, kind, text)
    if kind.name in ("lora_io.json", "hypernet.json", "configuration.json"):
        seal(directory, _facts(directory))
    assert "is not JSON" in refused(kind, directory)


def test_a_key_given_twice_is_refused_with_its_name(given: tuple[Kind, Path]) -> None:
    kind, directory = given
    path = directory / kind.name
    text = path.read_text()
    sealed = text.startswith('{\n "seal"')
    text = '{"zz": 1, "zz": 2, ' + text.partition(",\n" if sealed else "{")[2]
    path.write_text(seal_text(text) if sealed else text)
    if kind.name in ("lora_io.json", "hypernet.json", "configuration.json"):
        seal(directory, _facts(directory))
    if kind.name == "adapter.json":  # whose reader here writes it anew
        kind = replace(kind, read=AdapterDescription.load)
    assert "has the key 'zz' twice in one object" in refused(kind, directory)


def _facts(directory: Path) -> dict[str, Any]:
    manifest = json.loads((directory / "manifest.json").read_text())
    return {key: value for key, value in manifest.items() if key not in ("seal", "format", "coatrt", "files")}


@pytest.mark.parametrize("text", ["[]", "null", "5", '"a"', "{}", '{"format": "1"}', f'{{"default": {2**70}}}'])
def test_another_structure_is_refused(given: tuple[Kind, Path], text: str) -> None:
    kind, directory = given
    put(directory, kind, text)
    if kind.name == "run.json" and "format" in text:
        with pytest.raises(ConfigError, match="holds a training with other options"):
            kind.read(directory)
    elif kind.name == "manifest.json" and "format" in text:
        with pytest.raises(CoatError, match=r"has bundle format \S+, coatrt \S+ reads 3; build it again"):
            kind.read(directory)
    else:
        refused(kind, directory)


@pytest.mark.parametrize("given", [name for name, kind in KINDS.items() if kind.number], indirect=True)
@pytest.mark.parametrize("value", ["3", 1.5, True, None, [], {}, 2**70, -(2**70)])
def test_a_number_of_another_type_is_refused_with_its_place(given: tuple[Kind, Path], value: object) -> None:
    kind, directory = given
    altered(directory, kind, kind.number, lambda inner, key: inner.__setitem__(key, value))
    said = refused(kind, directory)
    if abs(value if isinstance(value, int) else 0) < 2**64:
        assert str(kind.number[-1]) in said.partition("`$")[2]


HOSTILE: list[tuple[str, tuple[Any, ...]]] = [
    ("manifest", ("matrices", "matrices", 0, 1)),
    ("manifest", ("matrices", "matrices", 1, 2)),
    ("manifest", ("matrices", "other_bytes")),
    ("manifest", ("configuration", "average_bits")),
    ("manifest", ("configuration", "bytes")),
    ("manifest", ("configuration", "errors", "model.embed_tokens")),
    *(("manifest", ("decoders", "cpu", "io", name)) for name in ("layers", "kv_heads", "head_dim", "vocabulary")),
    ("manifest", ("model", "stop_tokens", 0)),
    ("metrics", ("held_out", "budgets", 0, "bits")),
    ("metrics", ("held_out", "budgets", 0, "adapted")),
    ("metrics", ("held_out", "full_precision")),
    ("metrics", ("losses", 0, 0)),
    ("metrics", ("seconds",)),
    *(("metrics", ("options", name)) for name in ("rank", "batch", "max_length", "precision")),
    ("sensitivities", ("costs", "model.embed_tokens", "int8")),
    ("sensitivities", ("errors", "model.embed_tokens", "int8")),
    *(("adapter", ("description", "spec", name)) for name in ("layers", "hidden", "heads", "vocabulary")),
    ("adapter", ("description", "space", "model", "matrices", 1, 1)),
    ("adapter", ("description", "contract", "tensors", 0, "N")),
    ("adapter", ("description", "contract", "alpha")),
    ("archive", ("parameters",)),
    ("archive", ("rows", 0, 0)),
    ("archive", ("rows", 0, 1)),
    *(("timings", ("products", 0, name)) for name in ("K", "N", "tokens", "seconds")),
    ("timings", ("rests", 0, "context")),
    ("LoRA contract", ("tensors", 0, "K")),
    ("plan", ("bytes_per_token",)),
    ("plan", ("request", "context")),
    *(("model", (name,)) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")),
    ("model", ("vocab_size",)),
]
_FLOATS = ("adapted", "full_precision", 0, 1, "int8")  # which may be negative, in metrics, costs and archives


@pytest.mark.parametrize("value", [2**62, 2**63 - 1, -1, {}, [], "x", True, 1e300, -1e300], ids=str)
@pytest.mark.parametrize(("name", "place"), HOSTILE, ids=lambda part: str(part).replace(" ", ""))
def test_a_number_that_cannot_be_is_refused_with_its_place(
    name: str, place: tuple[Any, ...], value: object, valid: Path, tmp_path: Path
) -> None:
    kind, whole = KINDS[name], json.loads((valid / name / KINDS[name].name).read_text())
    inner = whole
    for step in place[:-1]:
        inner = inner.setdefault(step, {}) if isinstance(inner, dict) else inner[step]
    if value == -1 and place[-1] in _FLOATS and "errors" not in place and isinstance(inner[place[-1]], float):
        return
    directory = Path(shutil.copytree(valid / name, tmp_path / "d"))
    altered(directory, kind, place, lambda inner, key: inner.__setitem__(key, value))
    if name == "model":
        kind = replace(kind, read=lambda d: DecoderSpec.from_config(Checkpoint.open(d).config))
        with pytest.raises(CoatError):
            kind.read(directory)
        return
    said = refused(kind, directory)
    if "`$" in said:
        assert str(place[-1]) in said.partition("`$")[2] or "[...]" in said  # a key that is a name


def test_sizes_that_cannot_be_together_are_refused(valid: Path, tmp_path: Path) -> None:
    """Every number is one that could be, all of them are not: sums would overflow, lists would fill the memory."""
    for change, said in (
        (lambda m: [row.__setitem__(slice(1, 3), [2**31 - 1] * 2) for row in m], r"weights must be at most \d+"),
        (lambda m: m.clear(), "a model needs at least one matrix"),
        (lambda m: m.append(m[1]), "names must not repeat"),
        (lambda m: m[1].__setitem__(0, f"model.layers.{'9' * 5000}.mlp.up_proj"), "must be below 10000"),
    ):
        directory = Path(shutil.copytree(valid / "manifest", tmp_path / said[:3], dirs_exist_ok=True))
        alter_sealed(directory / "manifest.json", lambda whole, change=change: change(whole["matrices"]["matrices"]))
        with pytest.raises(CoatError, match=rf"bundle manifest .*manifest\.json: .*{said}"):
            Bundle.open(directory)


@pytest.mark.parametrize("given", [name for name, kind in KINDS.items() if kind.key], indirect=True)
def test_a_missing_key_is_refused_with_its_name(given: tuple[Kind, Path]) -> None:
    kind, directory = given
    altered(directory, kind, kind.key, lambda inner, key: inner.pop(key))
    assert kind.key[-1] in refused(kind, directory)


def test_unknown_keys(given: tuple[Kind, Path]) -> None:
    kind, directory = given
    altered(directory, kind, (*(kind.closed or ()), "memry"), lambda inner, key: inner.__setitem__(key, 1))
    if kind.closed is not None:
        assert "memry" in refused(kind, directory)
    elif kind.name == "archive.json":
        assert len(Archive.load(directory / kind.name)) == 1
    else:
        kind.read(directory)  # a later coatrt, or Hugging Face, may add keys


def test_a_misspelled_key_of_a_plan_is_found(valid: Path, tmp_path: Path) -> None:
    whole = json.loads((valid / "plan" / "plan.json").read_text())
    whole["request"]["contxt"] = whole["request"].pop("context")
    write_json(tmp_path / "p.json", whole)
    with pytest.raises(ConfigError, match=r"p\.json, request, has the unknown key 'contxt'; did you mean 'context'\?"):
        read_choice(tmp_path / "p.json", MODEL.matrices)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    value = {"é": [1, 2.5, None, np.float64(0.1)], "t": (True, "x\u2028"), "o": Product(4, 4, "int8", 1, 1e-5)}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text == dump_json(value) + "\n"
    assert text.startswith('{\n "é": [\n  1,\n')
    assert json.loads(text) == to_data(value) == read_as(tmp_path / "x.json", dict[str, Any], "thing", "")
    assert to_data(value)["o"]["seconds"] == 1e-5
    assert read_as(tmp_path / "x.json", object, "thing", "") == parse_json(text, "text", "")


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"thing .*none does not exist; give the path of an existing file"):
        read_as(tmp_path / "none", object, "thing", "")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory; give the path of a readable file"):
        read_as(tmp_path, object, "thing", "")
    (tmp_path / "bin").write_bytes(b'"\xff"')
    with pytest.raises(ConfigError, match=r"thing .*bin line 1 is not UTF-8 .*; save it as UTF-8"):
        read_as(tmp_path / "bin", object, "thing", "make it again")
