"""Exports of the tiny bundle, and onnxruntime-genai where it is installed."""

from pathlib import Path
from typing import Any

import pytest

from coatrt.bundle import Bundle
from coatrt.engines.genai.export import export_genai
from coatrt.engines.genai.options import GenaiOptions


@pytest.fixture(scope="session")
def og() -> Any:
    return pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai: make test installs it")


@pytest.fixture(scope="session")
def exported(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle for the CPU, with logits of the last token."""
    output = tmp_path_factory.mktemp("genai") / "model"
    return export_genai(Bundle.open(tiny_bundle), output, GenaiOptions(provider="cpu")).directory


@pytest.fixture(scope="session")
def every_logit(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle for the CPU, with logits of every token and exact products."""
    output, options = tmp_path_factory.mktemp("genai") / "every", GenaiOptions("cpu", all_logits=True, accuracy_level=0)
    return export_genai(Bundle.open(tiny_bundle), output, options).directory
