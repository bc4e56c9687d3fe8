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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests in C++: compiling takes every core, and what comes later can be shared out."""
    items.sort(key=lambda item: not item.path.name.startswith("test_cpp"))


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
