"""Shared fixtures: tiny random models with a byte tokenizer, saved as Hugging Face directories, and a tiny adapter."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.tiny import save_tiny_llama, text_data, tiny_options

if importlib.util.find_spec("torch") is not None:  # the fast tests do without
    import torch

    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let pytest-xdist give a worker whole files, whose fixtures it makes once, and one worker all C++, first."""
    compiled = [item.path.name.startswith("test_cpp") for item in items]
    for item, cpp in zip(items, compiled, strict=True):
        item.add_marker(pytest.mark.xdist_group("cpp" if cpp else str(item.path)))
    items[:] = [item for cpp in (True, False) for item, other in zip(items, compiled, strict=True) if other is cpp]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COATRT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an adapter of `tiny_llama`, trained for a few steps."""
    from coatrt.training.run import train

    directory = tmp_path_factory.mktemp("adapter") / "adapter"
    train(tiny_llama, text_data(tiny_llama), directory, tiny_options(steps=20))
    return directory
