"""Where a model is: conversions that the cache cannot hold."""

from pathlib import Path

import pytest

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
