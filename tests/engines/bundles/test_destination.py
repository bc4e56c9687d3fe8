"""What --overwrite may replace: bundles, damaged or not, and nothing of anybody else's."""

import json
from pathlib import Path

import pytest

from coatrt.bundle import MANIFEST, seal
from coatrt.engines.bundles.destination import check_output
from coatrt.errors import ConfigError


def refused(output: Path, said: str) -> None:
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=said) as caught:
            check_output(output, overwrite)
        assert "\n" not in str(caught.value)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    directory = tmp_path / "bundle"
    (directory / "tokenizer" / "more").mkdir(parents=True)
    for name in ("base.onnx", "weights.bin", "tokenizer/tokenizer.json", "tokenizer/more/merges.txt"):
        (directory / name).write_text(name)
    seal(directory, {"device": "rtx-4090"})
    return directory


def test_a_bundle_is_replaced_when_told_so_damaged_or_not(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="--overwrite to replace it"):
        check_output(bundle, overwrite=False)
    check_output(bundle, overwrite=True)
    (bundle / "weights.bin").write_text("flipped")
    (bundle / "base.onnx").unlink()
    check_output(bundle, overwrite=True)
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**manifest, "format": 0}))  # of another coatrt
    check_output(bundle, overwrite=True)


@pytest.mark.parametrize(
    "manifest",
    [
        '{"manifest_version": 3, "name": "an extension"}',
        '{"format": 1, "files": {"index.html": {}}}',
        "[]",
        '{"format": 1, "coatrt": "0.1.0", "files": ["index.html"]}',
        '{"format": 1, "coatrt": "0.1',
        "\udcff",
    ],
)
def test_a_foreign_manifest_makes_no_bundle(tmp_path: Path, manifest: str) -> None:
    app = tmp_path / "webapp"
    app.mkdir()
    (app / "index.html").write_text("<p>years of work")
    (app / MANIFEST).write_bytes(manifest.encode(errors="surrogateescape"))
    refused(app, r"webapp holds other files \(index.html, manifest.json\); give a new directory")


def test_what_is_added_to_a_bundle_is_not_deleted(bundle: Path) -> None:
    (bundle / "notes").mkdir()
    refused(bundle, r"holds other files \(notes\)")
    (bundle / "notes" / "a.txt").write_text("mine")
    refused(bundle, r"holds other files \(notes\)")
    for name in ("tokenizer/mine.txt", "a.txt", "sm90.part"):
        (bundle / name).write_text("mine")
    refused(bundle, r"holds other files \(a.txt, notes, sm90.part, …\)")


def test_a_link_in_a_bundle_is_another_file(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (bundle / "link").symlink_to(tmp_path / "home")
    refused(bundle, r"holds other files \(link\)")


def test_what_a_build_kit_leaves_is_the_bundles(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    (bundle / "build.json").write_text("{}")
    seal(bundle, {})
    for name in ("sm90.part", "sm90.engine", f"{MANIFEST}.part"):
        (bundle / name).write_text("stopped")
    check_output(bundle, overwrite=True)


def test_what_cannot_be_renamed_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "a" / "b"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for output in (Path(), Path(".."), here, tmp_path, Path("/")):
        refused(output, "is or contains the current directory")
    check_output(tmp_path / "a" / "c", overwrite=False)
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    check_output(mounted, overwrite=False)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == mounted)
    refused(mounted, "is a mount point")
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", "is a file")
