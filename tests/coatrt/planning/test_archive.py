"""The archive's file: round trip, damage, other adapters; its front."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coatrt.configs.config import QuantConfig
from coatrt.errors import ConfigError
from coatrt.planning.archive import Archive, ArchiveEntry
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.json_data import read_as, write_json

pytestmark = pytest.mark.fast

NAMES = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens")
FORMATS = tuple(map(WeightFormat.parse, ("nf3-g64", "int4-g64", "int8")))


def entry(seed: int, **changes: float) -> ArchiveEntry:
    rng = np.random.default_rng(seed)
    config = QuantConfig({name: FORMATS[seed // 3**i % 3] for i, name in enumerate(NAMES)})
    facts = {"nbytes": int(rng.integers(100, 200)), "loss": float(rng.random()), **changes}
    return ArchiveEntry(config, int(facts["nbytes"]), facts["loss"])


def test_what_is_added_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "archive.json"
    archive = Archive(1000, path, "me")
    for seed in range(6):
        archive.add(entry(seed))
        again = Archive.load(path, "me")  # after every addition the file is whole
        assert again.entries == archive.entries
        assert again.parameters == 1000
    more = Archive.open(path, 1000, "me")
    more.add(entry(9))
    assert len(Archive.load(path)) == 7
    assert [p.name for p in tmp_path.iterdir()] == ["archive.json"]


def test_the_last_measurement_of_a_configuration_counts() -> None:
    archive = Archive(800)
    first, second = entry(0, nbytes=100, loss=3.0), entry(1, nbytes=200, loss=2.0)
    assert first.config != second.config
    for one in (first, second):
        archive.add(one)
    assert archive.points(archive.front()) == [(1.0, 3.0), (2.0, 2.0)]
    assert archive.hypervolume((3.0, 4.0)) == pytest.approx(1 * 2 + 1 * 1)
    archive.add(ArchiveEntry(first.config, 100, 1.0))
    assert archive.front() == (archive.find(first.config),)
    assert len(archive) == 2
    archive.add(ArchiveEntry(second.config, 200, 0.5))
    assert [one.loss for one in archive.front()] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("   0.", "   1.", "altered or is damaged"),
        ('"identity": "me"', '"identity": "you"', "altered or is damaged"),
        ("{", "", "has no seal: it was altered, or another coatrt wrote it; remove it"),
    ],
)
def test_damage_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    archive = Archive(1000, tmp_path / "a.json", "me")
    archive.add(entry(1))
    text = (tmp_path / "a.json").read_text()
    assert old in text
    (tmp_path / "a.json").write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=said):
        Archive.load(tmp_path / "a.json")


@pytest.mark.parametrize("choice", ["0 0", "0 0 7", "0 0 -1", "x y z"])
def test_a_sealed_but_garbled_archive_is_refused(tmp_path: Path, choice: str) -> None:
    from coatrt.planning.archive import _File

    archive = Archive(1000, tmp_path / "a.json", "me")
    archive.add(entry(1))
    file = read_as(tmp_path / "a.json", _File, "archive", "", sealed=True)
    (row,) = file.rows
    write_json(tmp_path / "a.json", replace(file, rows=((*row[:2], choice),)), sealed=True)
    with pytest.raises(ConfigError, match="garbled"):
        Archive.load(tmp_path / "a.json")
    write_json(tmp_path / "a.json", replace(file, format=2), sealed=True)
    with pytest.raises(ConfigError, match=r"a\.json has format 2, coatrt \S+ reads 5; remove it"):
        Archive.load(tmp_path / "a.json")


def test_another_adapter_and_wrong_entries_are_refused(tmp_path: Path) -> None:
    Archive(1000, tmp_path / "a.json", "me").add(entry(1))
    with pytest.raises(ConfigError, match=r"measured with another adapter or other text \(me, now you\)"):
        Archive.open(tmp_path / "a.json", 1000, "you")
    for changes in ({"nbytes": 0}, {"loss": float("nan")}, {"loss": float("inf")}):
        with pytest.raises(ConfigError, match="archive entry"):
            entry(1, **changes)
