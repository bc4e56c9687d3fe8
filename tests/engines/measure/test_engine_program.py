"""What engines do in a step: products read packed weights, and how many kernels a layer takes."""

from pathlib import Path

import pytest

from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import contract_for
from coatrt.devices.profiles import device_profile
from coatrt.engines.builders.builder import build_engine
from coatrt.engines.measure.engine_program import Launch, decoded_weights, engine_program
from coatrt.errors import BuildError
from coatrt.export.decoder import GraphForm, export_decoder
from coatrt.models.checkpoint import Checkpoint
from coatrt.planning.latency import decoded_in_steps
from coatrt.quantization.weight_format import WeightFormat
from support.tiny import save_tiny_llama

pytest.importorskip("tensorrt_rtx")


def program(root: Path, fmt: str, layers: int) -> list[Launch]:
    root.mkdir()
    checkpoint = Checkpoint.open(save_tiny_llama(root / "model", hidden_size=256, num_hidden_layers=layers))
    config, contract = QuantConfig.uniform(checkpoint.matrices, fmt), contract_for(checkpoint.matrices, 16, 32)
    export_decoder(checkpoint, config, root, forms=[GraphForm("engine", "base.onnx", "float16", 64)], contract=contract)
    build_engine(root / "base.onnx", root / "e", device_profile("rtx-5090" if fmt == "nvfp4" else "rtx-4090"))
    return engine_program(root / "e")


@pytest.mark.parametrize("fmt", ["int4-g64", "int8", "fp8"])
def test_products_read_packed_weights_and_a_layer_takes_few_kernels(tmp_path: Path, fmt: str) -> None:
    few, many = (program(tmp_path / str(layers), fmt, layers) for layers in (2, 4))
    assert decoded_weights(many) == set()
    assert not decoded_in_steps(WeightFormat.parse(fmt), 256)
    assert (len(many) - len(few)) / 2 <= 21
    reading = [launch for launch in many if any(node.endswith(".product") for node in launch.nodes)]
    assert len(reading) == 4 * 4  # one product for q|k|v, o, gate|up and down of each layer
    assert not any(name.startswith("lora_") for launch in reading for name in launch.inputs)


@pytest.mark.parametrize("fmt", ["nf4-g64", "int8-g64", "nvfp4"])
def test_the_planner_knows_which_weights_are_decoded_in_every_step(tmp_path: Path, fmt: str) -> None:
    kinds = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    expected = {f"model.layers.{layer}.{kind}" for layer in range(2) for kind in kinds}
    assert decoded_weights(program(tmp_path / "nf", fmt, 2)) == expected
    assert decoded_in_steps(WeightFormat.parse(fmt), 256)


def test_a_file_without_a_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e").write_bytes(b"engine")
    with pytest.raises(BuildError, match="no readable program in"):
        engine_program(tmp_path / "e")
