"""LoRA contract and decoder inputs/outputs: names, shapes, validation, JSON."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coatrt.configs.lora_contract import DecoderIO, LoraContract, LoraTensor, contract_for
from coatrt.errors import ConfigError
from coatrt.models.matrices import Matrix, ModelMatrices
from coatrt.system.json_data import convert, read_as, to_data, write_json

pytestmark = pytest.mark.fast

MODEL = ModelMatrices(
    (
        Matrix("model.embed_tokens", 100, 64),
        Matrix("model.layers.0.self_attn.q_proj", 48, 64),
        Matrix("model.layers.0.mlp.down_proj", 64, 160),
        Matrix("lm_head", 100, 64),
    ),
    tied=False,
)
IO = DecoderIO(2, 2, 16, 256, 64, "float16", 64)


def test_contract_covers_the_targets_in_network_order() -> None:
    contract = contract_for(MODEL, 16, 32)
    assert list(contract.shapes.items()) == [
        ("lora_A.model.layers.0.self_attn.q_proj", (64, 16)),
        ("lora_B.model.layers.0.self_attn.q_proj", (16, 48)),
        ("lora_A.model.layers.0.mlp.down_proj", (160, 16)),
        ("lora_B.model.layers.0.mlp.down_proj", (16, 64)),
    ]
    assert contract.scale(contract.tensors[0]) == 2.0
    assert contract.dtype == "float32"
    assert contract.by_matrix["model.layers.0.mlp.down_proj"].K == 160


def test_contract_file_round_trip(tmp_path: Path) -> None:
    contract = contract_for(MODEL, 32, 48.5)
    write_json(tmp_path / "lora_io.json", contract)
    assert read_as(tmp_path / "lora_io.json", LoraContract, "LoRA contract", "export again") == contract


@pytest.mark.parametrize(("rank", "alpha"), [(8, 16), (0, 16), (-16, 16), (24, 16), (16, 0), (16, float("inf"))])
def test_contract_refuses_rank_and_alpha(rank: int, alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"^(the LoRA rank|LoRA alpha) must be .*, got "):
        contract_for(MODEL, rank, alpha)


def test_contract_refuses_repeated_names_and_no_tensors() -> None:
    row = LoraTensor("m", "a", "b", 4, 4, 16)
    for tensors in ((), (row, row), (LoraTensor("m", "a", "a", 4, 4, 16),)):
        with pytest.raises(ConfigError, match="distinct tensor names"):
            LoraContract(16.0, "float32", tensors)


@pytest.mark.parametrize(
    "value", [None, [], {}, {"rank": 16}, {"alpha": 1, "dtype": "float32", "tensors": [{"rank": "x"}]}]
)
def test_contract_refuses_garbled_json(value: object) -> None:
    with pytest.raises(ConfigError, match="export again"):
        convert(value, LoraContract, "lora_io.json", "export again")


def test_contract_refuses_another_scale_rule() -> None:
    value = to_data(contract_for(MODEL, 16, 16)) | {"scale_rule": "alpha/sqrt(rank)"}
    with pytest.raises(ConfigError, match="sqrt"):
        convert(value, LoraContract, "lora_io.json", "export again")


def test_decoder_io_names_and_round_trip() -> None:
    assert IO.past_names == (
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
        "past_key_values.1.value",
    )
    assert IO.present_names[-1] == "present.1.value"
    assert convert(to_data(IO), DecoderIO, "io", "") == IO
    open_length = DecoderIO(2, 2, 16, 256, None, "float32", 64)
    assert convert(to_data(open_length), DecoderIO, "io", "") == open_length


@pytest.mark.parametrize("change", [{"layers": 0}, {"kv_heads": "2"}, {"cache_length": -1}, {"activations": "int8"}])
def test_decoder_io_refuses(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        convert(to_data(IO) | change, DecoderIO, "io", "export again")


def test_the_inputs_of_a_graph_are_joined_and_hold_zeros() -> None:
    layer = "model.layers.0.mlp."
    pair = tuple(Matrix(f"{layer}{kind}_proj", 160, 64) for kind in ("gate", "up"))
    contract = contract_for(replace(MODEL, matrices=(*MODEL.matrices[:2], *pair, *MODEL.matrices[2:])), 16, 32)
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in contract.shapes.items()}
    inputs = contract.graph_inputs(tensors)
    gate, up = (tensors[f"lora_B.{layer}{kind}_proj"] for kind in ("gate", "up"))
    expected = np.block([[gate, np.zeros_like(up)], [np.zeros_like(gate), up]])
    assert np.array_equal(inputs[f"lora_B.{layer}gate_up_proj"], expected)
    side_by_side = np.hstack([tensors[f"lora_A.{layer}{kind}_proj"] for kind in ("gate", "up")])
    assert np.array_equal(inputs[f"lora_A.{layer}gate_up_proj"], side_by_side)
    assert {name: value.shape for name, value in inputs.items()} == contract.inputs
    tensor = contract.by_matrix[f"{layer}up_proj"]
    with pytest.raises(ConfigError, match="differ in K"):
        replace(contract, tensors=(replace(tensor, matrix="a", A="b", B="c", K=80), tensor))
