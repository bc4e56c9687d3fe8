"""Where a model is: conversions that the cache cannot hold."""

from pathlib import Path

import pytest

from coatrt.errors import CheckpointError
from coatrt.models.checkpoint import Checkpoint
from support.families import save_model
from support.gguf_files import write_gguf
from support.programs import run_program

pytest.importorskip("gguf", reason="needs the gguf extra")

_OPEN = """
import sys
from coatrt.models.checkpoint import Checkpoint
opened = [Checkpoint.open(sys.argv[1]) for _ in range(2)]
print(opened[0].fingerprint, *{str(each.directory) for each in opened})
"""


@pytest.mark.parametrize(
    ("place", "reason"),
    [("file/cache", "Not a directory"), ("a" * 300, "File name too long"), ("/proc/x", "No such file or directory")],
)
def test_a_conversion_that_the_cache_cannot_hold_lasts_as_long_as_the_process(
    place: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / f"{'é' * 120}.gguf", save_model(tmp_path / "m", "llama", vocab_size=272))
    fingerprint = Checkpoint.open(path).fingerprint
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path / place))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    done = run_program(_OPEN, path)
    assert done.returncode == 0, done.stderr
    found, directory = done.stdout.split()
    assert found == fingerprint
    assert Path(directory).is_relative_to(tmp_path / "tmp")
    assert not list((tmp_path / "tmp").glob("*coatrt*"))
    said = [line for line in done.stderr.splitlines() if line.startswith("coatrt")]
    assert len(said) == 1 and f"cannot be written ({reason}); later runs repeat" in said[0]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("LocalEntryNotFoundError", "the Hugging Face hub cannot be reached"),
        ("HFValidationError", "not a name of the hub, such as HuggingFaceTB/SmolLM2-135M"),
        ("RepositoryNotFoundError", "the hub has no such model; a private one needs: hf auth login"),
        ("GatedRepoError", "the hub asks to accept its licence first, and to log in with: hf auth login"),
    ],
)
def test_why_a_model_cannot_be_downloaded_is_one_clause(name: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def fail(*_: object, **__: object) -> None:
        kind = getattr(errors, name)
        raise kind.__new__(kind)  # most need a response to be initialised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open("some/model")
    assert str(caught.value) == (
        f"model some/model is neither a local path nor a model that can be downloaded ({why}); "
        "give a Hugging Face directory, a GGUF file or a hub name"
    )
