"""TensorRT-RTX builds the engine form of every weight format, with no GPU present."""

from pathlib import Path
from typing import Any

import pytest

from coatrt.configs.lora_contract import contract_for
from coatrt.export.decoder import GraphForm
from coatrt.models.checkpoint import Checkpoint
from support.families import MODELS, UNLIKE, export, save_model

pytestmark = pytest.mark.rtx
trt = pytest.importorskip("tensorrt_rtx")

FORMATS = {
    "fp16": "SM75", "bf16": "SM86", "int8": "SM75", "int8-g32": "SM86", "int8-g64": "SM86", "int8-g128": "SM86",
    "int4-g32": "SM86", "int4-g64": "SM86", "int4-g128": "SM86", "fp8": "SM89", "nvfp4": "SM120", "nf2-g16": "SM75",
    "nf2-g64": "SM86", "nf3-g32": "SM86", "nf4-g64": "SM86", "nf8-g16": "SM86", "nf3-g16-dq2-fp16-256": "SM86",
    "nf4-g64-dq8-fp16-256": "SM86", "nf2-g32-dq3-fp32-64": "SM86", "nf8-g64-dq4-bf16-16": "SM86",
}  # fmt: skip


def build(path: Path, capability: str, longest: int = 32) -> Any:
    """Return the engine of a graph for one compute capability, or None where the builder refuses it."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        one = tuple(1 if size == -1 else size for size in tensor.shape)
        most = tuple((longest if axis else 4) if size == -1 else size for axis, size in enumerate(tensor.shape))
        profile.set_shape(tensor.name, one, one, most)
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, "llama-tied-biases")
    return Checkpoint.open(directory)


@pytest.mark.parametrize("activations", ["float16", "bfloat16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_engine_form_builds(tmp_path: Path, model: Checkpoint, fmt: str, activations: str) -> None:
    capability = FORMATS[fmt]
    if activations == "bfloat16" and capability == "SM75":
        capability = "SM86"  # Turing has no bfloat16
    form = GraphForm("engine", "base.onnx", activations, 64)
    contract = contract_for(model.matrices, 16, 32)
    engine = build(export(model, tmp_path, (form,), fmt, contract) / form.file, capability)
    assert engine is not None
    assert engine.nbytes > 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in UNLIKE else [pytest.mark.slow])
        for name in MODELS
        if name != "llama-tied-biases"
    ],
)
def test_every_family_builds(tmp_path: Path, name: str) -> None:
    save_model(tmp_path / "model", name)
    form = GraphForm("engine", "base.onnx", "float16", 64)
    assert build(export(Checkpoint.open(tmp_path / "model"), tmp_path / "out", (form,)) / form.file, "SM86") is not None
