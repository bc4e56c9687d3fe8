"""A training state that was altered is refused in one line, whatever of it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from coatrt.errors import CoatError
from coatrt.training.run import train
from support.tiny import text_data, tiny_options

OPTIONS = tiny_options(steps=3, checkpoint_every=1, preset="none", compensation=False, formats=("int8", "int4-g32"))


class _Stopped(Exception):
    pass


def _replace(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert data.count(old) >= 1
        return data.replace(old, new, 1)

    return change


@pytest.fixture(scope="module")
def unfinished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unfinished") / "a"

    def stop(done: int, total: int, stage: str, note: str = "") -> None:
        if stage == "training" and (directory / "training" / "state.safetensors").is_file():
            raise _Stopped

    with pytest.raises(_Stopped):
        train(tiny_llama, text_data(tiny_llama), directory, OPTIONS, progress=stop)
    return directory


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("state.safetensors", _replace(b'step\\": 1', b'step\\": 2')),
        ("sensitivity.json", _replace(b"0.0", b"0.1")),
        ("run.json", _replace(b'"run"', b'"rum"')),
        ("run.json", lambda data: b'{"run": "me"}'),
    ],
)
def test_an_altered_state_is_refused(
    unfinished: Path, tiny_llama: Path, tmp_path: Path, name: str, change: Callable[[bytes], bytes]
) -> None:
    directory = Path(shutil.copytree(unfinished, tmp_path / "a"))
    path = directory / "training" / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CoatError, match=rf"{name} (is damaged|was altered or is damaged|has no seal).*; ") as error:
        train(tiny_llama, text_data(tiny_llama), directory, OPTIONS, resume=True)
    assert "\n" not in str(error.value)
