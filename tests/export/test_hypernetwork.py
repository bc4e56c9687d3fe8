"""hypernet.onnx against the torch module it was written from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from coatrt.adapter.adapter import Adapter
from coatrt.export.hypernetwork import export_hypernetwork
from coatrt.training.run import train
from support.formats import random_config
from support.tiny import text_data, tiny_options


@pytest.fixture(scope="module", params=["coatrt", "paper", "none", "ranks", "uncompensated"])
def adapter(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    directory = tmp_path_factory.mktemp("hypernet") / "adapter"
    change: dict[str, Any] = {
        "ranks": {"ranks": (("down_proj", 32), ("v_proj", 48))},
        "uncompensated": {"compensation": False},
    }.get(request.param, {"preset": request.param})
    return train(tiny_llama, text_data(tiny_llama), directory, tiny_options(**change))


def test_graph_equals_torch_for_configurations_never_seen(adapter: Adapter, tmp_path: Path) -> None:
    export_hypernetwork(adapter, tmp_path)
    session = ort.InferenceSession(str(tmp_path / "hypernet.onnx"), providers=["CPUExecutionProvider"])
    side = json.loads((tmp_path / "hypernet.json").read_text())
    assert side["matrices"] == [tensor.matrix for tensor in adapter.description.contract.tensors]
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape) == ("formats", "tensor(int64)", [len(side["matrices"])])
    shapes = {out.name: tuple(out.shape) for out in session.get_outputs()}
    assert shapes == dict(adapter.description.contract.shapes)
    assert list(shapes) == list(adapter.description.contract.shapes)
    rng, seen = np.random.default_rng(11), set()
    for _ in range(20):
        config = random_config(adapter.description.space, rng)
        ids = np.array([side["formats"].index(str(config[name])) for name in side["matrices"]])
        emitted, expected = session.run(list(shapes), {"formats": ids}), adapter.emit(config)
        for name, value in zip(shapes, emitted, strict=True):
            np.testing.assert_allclose(value, expected[name].numpy(), atol=1e-5)
        seen.add(b"".join(value.tobytes() for value in emitted))
    assert len(seen) == 20  # every configuration has a LoRA of its own


def test_graph_is_standard_onnx(adapter: Adapter, tmp_path: Path) -> None:
    export_hypernetwork(adapter, tmp_path)
    model = onnx.load(tmp_path / "hypernet.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}


def test_large_tensors_go_to_a_file_of_their_own(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coatrt.export.hypernetwork._LARGE", 1000)
    export_hypernetwork(adapter, tmp_path)
    assert (tmp_path / "hypernet.bin").stat().st_size > (tmp_path / "hypernet.onnx").stat().st_size
    session = ort.InferenceSession(str(tmp_path / "hypernet.onnx"), providers=["CPUExecutionProvider"])
    config = random_config(adapter.description.space, np.random.default_rng(0))
    ids = adapter.encoder.format_ids(config).numpy()
    (value,) = session.run([adapter.description.contract.tensors[-1].B], {"formats": ids})
    assert torch.allclose(
        torch.from_numpy(value), adapter.emit(config)[adapter.description.contract.tensors[-1].B], atol=1e-5
    )


def test_a_plain_lora_is_the_same_for_every_configuration(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = train(
        tiny_llama, text_data(tiny_llama), tmp_path / "adapter", tiny_options(preset="none", compensation=False)
    )
    export_hypernetwork(adapter, tmp_path)
    session = ort.InferenceSession(str(tmp_path / "hypernet.onnx"), providers=["CPUExecutionProvider"])
    expected = adapter.emit(adapter.description.space.uniform("int8"))
    values = session.run(
        list(expected), {"formats": adapter.encoder.format_ids(adapter.description.space.uniform("fp8")).numpy()}
    )
    for name, value in zip(expected, values, strict=True):
        np.testing.assert_allclose(value, expected[name].numpy(), atol=1e-6)
