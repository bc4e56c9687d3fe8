"""Where a model is: conversions that the cache cannot hold."""

from pathlib import Path

import pytest

from coatrt.models.checkpoint import Checkpoint
from support.programs import run_program

_OPEN = """
import sys
from pathlib import Path
import torch, transformers
from coatrt.models.checkpoint import Checkpoint
model, given, calls = sys.argv[1], sys.argv[2], []
for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
    def read(*_, real=kind.from_pretrained, gguf_file=None, **options):
        calls.append(gguf_file)
        return real(model, **options)
    kind.from_pretrained = read
opened = [Checkpoint.open(given) for _ in range(2)]
print(opened[0].fingerprint, len(calls), *{str(each.directory) for each in opened})
"""


def test_a_conversion_that_the_cache_cannot_hold_lasts_as_long_as_the_process(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "m.gguf").touch()
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    done = run_program(_OPEN, tiny_llama, tmp_path / "m.gguf")
    assert done.returncode == 0, done.stderr
    fingerprint, calls, directory = done.stdout.split()
    assert (fingerprint, calls) == (Checkpoint.open(tiny_llama).fingerprint, "2")
    assert Path(directory).is_relative_to(tmp_path / "tmp")
    assert not list((tmp_path / "tmp").glob("*coatrt*"))
    said = [line for line in done.stderr.splitlines() if line.startswith("coatrt")]
    assert len(said) == 1 and "cannot be written (Not a directory); later runs compute again" in said[0]
