"""A, B, U and the features behind U, against plain numpy; PEFT reads what is saved."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coatrt.adapter.adapter import Adapter
from coatrt.adapter.description import AdapterDescription
from coatrt.adapter.features import ConfigEncoder
from coatrt.adapter.lora import CoaLora
from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import contract_for
from coatrt.errors import CheckpointError, ConfigError
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.models.matrices import ModelMatrices, matrices_of
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.input_moments import Calibration
from coatrt.quantization.weight_format import WeightFormat
from support.formats import random_config
from support.seals import alter_sealed

FORMATS = tuple(map(WeightFormat.parse, ("nf2-g64", "int4-g64", "nf3-g32-dq4-bf16-256", "int8")))


@pytest.fixture(scope="module")
def model() -> ModelMatrices:
    shapes = {"model.embed_tokens.weight": (96, 64)}
    for layer in range(3):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.q_proj.weight": (64, 64), f"{at}.self_attn.k_proj.weight": (32, 64)}
        shapes |= {f"{at}.mlp.up_proj.weight": (128, 64), f"{at}.mlp.down_proj.weight": (64, 128)}
    return matrices_of(shapes, tied=True)


@pytest.fixture(scope="module")
def encoder(model: ModelMatrices) -> ConfigEncoder:
    errors = {m.name: {str(f): 0.1 / (1 + i + j) for j, f in enumerate(FORMATS)} for i, m in enumerate(model.targets)}
    return ConfigEncoder(model, FORMATS, errors)


def mixed(model: ModelMatrices) -> QuantConfig:
    return QuantConfig({name: FORMATS[i % 4] for i, name in enumerate(model.names)})


@pytest.mark.parametrize("preset", ["paper", "coatrt"])
def test_an_untrained_hypernetwork_leaves_plain_lora(encoder: ConfigEncoder, model: ModelMatrices, preset: str) -> None:
    lora = CoaLora(contract_for(model, 16, 32), encoder, preset)  # type: ignore[arg-type]
    emitted = lora.emit(mixed(model))
    assert list(emitted) == list(lora.contract.shapes)
    for tensor in lora.contract.tensors:
        a, _ = lora.shared()[tensor.matrix]
        assert torch.equal(emitted[tensor.A], a)
        assert not emitted[tensor.B].any()
        assert tuple(emitted[tensor.A].shape) == (tensor.K, 16)


def test_emitted_tensors_are_the_formula(encoder: ConfigEncoder, model: ModelMatrices) -> None:
    lora = CoaLora(contract_for(model, 16, 24), encoder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = encoder.format_ids(mixed(model))
    emitted = lora.emit(mixed(model))
    theta = {name: value.detach().double().numpy() for name, value in lora.theta.named_parameters()}
    indices, features = encoder.indices(ids).numpy(), encoder.features(ids).double().numpy()
    for row, tensor in enumerate(lora.contract.tensors):
        x = np.concatenate([theta[f"embeddings.{i}.weight"][indices[row, i]] for i in range(7)])
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * theta["norm.weight"] + theta["norm.bias"]
        h = theta["hidden.weight"] @ np.concatenate([x, features[row]]) + theta["hidden.bias"]
        U = (theta["out.weight"] @ (h / (1 + np.exp(-h))) + theta["out.bias"]).reshape(16, 16)
        a, b = (part.double().numpy() for part in lora.shared()[tensor.matrix])
        np.testing.assert_array_equal(emitted[tensor.A].numpy(), a.astype(np.float32))
        np.testing.assert_allclose(emitted[tensor.B].numpy(), 24 / 16 * (np.eye(16) + U).T @ b, atol=2e-6)
    assert np.abs(emitted[tensor.B].numpy() - b * 24 / 16).max() > 0.01


def test_features_are_bits_error_and_averages(encoder: ConfigEncoder, model: ModelMatrices) -> None:
    config = mixed(model)
    features = encoder.features(encoder.format_ids(config)).numpy()
    bits = np.array([config[m.name].bits_per_weight(m.K) for m in model.targets])
    sizes = np.array([m.N * m.K for m in model.targets])
    layers = np.array([m.layer for m in model.targets])
    errors = [encoder.errors[m.name][str(config[m.name])] for m in model.targets]
    np.testing.assert_allclose(features[:, 0], bits / 8, rtol=1e-6)
    np.testing.assert_allclose(features[:, 1], np.log10(errors) / 4, rtol=1e-5)
    np.testing.assert_allclose(features[:, 2], (bits @ sizes) / sizes.sum() / 8, rtol=1e-5)
    for layer in range(3):
        mine = layers == layer
        expected = bits[mine] @ sizes[mine] / sizes[mine].sum() / 8
        np.testing.assert_allclose(features[mine, 3], expected, rtol=1e-5)
    assert encoder.indices(encoder.format_ids(config))[:, 5].tolist() == layers.tolist()  # the true layer index


def test_a_format_not_trained_for_is_refused(encoder: ConfigEncoder, model: ModelMatrices) -> None:
    with pytest.raises(ConfigError, match=r"q_proj is fp8, which the adapter was not trained for; allowed: nf2-g64"):
        encoder.format_ids(QuantConfig.uniform(model, "fp8"))


def test_adapter_survives_saving(tiny_adapter: Path, tmp_path: Path) -> None:
    adapter = Adapter.from_pretrained(tiny_adapter)
    adapter.save_pretrained(tmp_path / "copy")
    again = Adapter.from_pretrained(tmp_path / "copy")
    config = random_config(adapter.description.space, np.random.default_rng(3))
    first, second = adapter.emit(config), again.emit(config)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert replace(again.description, hash=adapter.description.hash) == adapter.description
    assert again.description == AdapterDescription.load(tmp_path / "copy")
    assert again.description.formats == adapter.description.formats
    assert again.description.sensitivity == adapter.description.sensitivity
    assert again.description.quantizer == adapter.description.quantizer == "mse"
    assert adapter.calibration is not None
    assert again.calibration is not None
    assert torch.equal(again.calibration.tokens, adapter.calibration.tokens)
    assert adapter.calibration.tokens.shape == (4, 32)


def test_an_adapter_keeps_its_quantizer(tiny_adapter: Path, tmp_path: Path) -> None:
    adapter = Adapter.from_pretrained(tiny_adapter)

    def encoded_by(quantizer: Any, calibration: Calibration | None = adapter.calibration) -> Adapter:
        return Adapter(replace(adapter.description, quantizer=quantizer), adapter.lora, calibration)

    encoded_by("feedback").save_pretrained(tmp_path / "fed")
    fed = Adapter.from_pretrained(tmp_path / "fed")
    assert fed.description.quantizer == fed.codes(fed.checkpoint()).quantizer == "feedback"
    encoded_by("absmax", None).save_pretrained(tmp_path / "paper")
    assert Adapter.from_pretrained(tmp_path / "paper").calibration is None
    assert not (tmp_path / "paper" / "calibration.safetensors").exists()
    with pytest.raises(ConfigError, match="feedback needs calibration tokens"):
        encoded_by("feedback", None)
    with pytest.raises(
        ConfigError, match="no quantizer 'best'; allowed: absmax, mse, weighted, gptq, feedback, refined"
    ):
        encoded_by("best")


@pytest.mark.parametrize(
    "name",
    [
        "adapter.json",
        "adapter.safetensors",
        "sensitivity.json",
        "metrics.json",
        "calibration.safetensors",
        "peft/adapter_config.json",
        "peft/adapter_model.safetensors",
    ],
)
def test_an_altered_adapter_is_refused(tiny_adapter: Path, tmp_path: Path, name: str) -> None:
    Adapter.from_pretrained(tiny_adapter).save_pretrained(tmp_path / "a")
    data = bytearray((tmp_path / "a" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a" / name).write_bytes(data)
    with pytest.raises(CheckpointError, match="was altered or is damaged"):
        Adapter.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("garbled", [None, 5, ["adapter.safetensors"]])
def test_an_adapter_without_hashes_is_refused(tiny_adapter: Path, tmp_path: Path, garbled: object) -> None:
    Adapter.from_pretrained(tiny_adapter).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter.json"
    alter_sealed(path, lambda whole: whole.update(sha256=garbled))
    for read in (Adapter.from_pretrained, AdapterDescription.load):
        with pytest.raises(CheckpointError, match=r"adapter\.json is garbled \(Expected .* - at `\$\.sha256`"):
            read(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 3}, r"adapter\.json has format 3, coatrt \S+ reads 9; copy it again, or train it again"),
        (
            {"description": None},
            r"Expected `object`, got `null` - at `\$\.description`\); copy it again, or train it again",
        ),
        ({"spec": {}}, r"Object missing required field `family` - at `\$\.spec`\); train it again"),
        ({"spec": None}, r"Expected `object`, got `null` - at `\$\.spec`\); train it again"),
        ({"quantizer": "best"}, r"Invalid enum value 'best' - at `\$\.quantizer`"),
        (
            {
                "space": {
                    "model": {"matrices": [["model.embed_tokens", 4, 4]], "tied": True},
                    "formats": [{"kind": "int5"}],
                }
            },
            "no weight format int5",
        ),
    ],
)
def test_a_garbled_description_is_one_line(
    tiny_adapter: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    Adapter.from_pretrained(tiny_adapter).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter.json"

    def change(whole: dict[str, Any]) -> None:
        whole["description"] |= {key: value for key, value in changes.items() if key in whole["description"]}
        whole |= {key: value for key, value in changes.items() if key in whole}

    alter_sealed(path, change)
    for read in (Adapter.from_pretrained, AdapterDescription.load):
        with pytest.raises(CheckpointError, match=said) as refused:
            read(tmp_path / "a")
        assert "\n" not in str(refused.value)


def test_an_adapter_refuses_another_model(tiny_adapter: Path, tmp_path: Path) -> None:
    from support.tiny import save_tiny_llama

    other = save_tiny_llama(tmp_path / "other", seed=9)
    with pytest.raises(CheckpointError, match="the adapter was trained on"):
        Adapter.from_pretrained(tiny_adapter).checkpoint(other)


def test_peft_computes_the_same_logits(tiny_adapter: Path, tiny_llama: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    adapter = Adapter.from_pretrained(tiny_adapter)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tiny_adapter / "peft").eval()
    checkpoint = adapter.checkpoint()
    ours = FakeQuantModel(checkpoint, CodeStore(checkpoint))
    shared = {
        name: (a, b * adapter.description.contract.scale(adapter.description.contract.by_matrix[name]))
        for name, (a, b) in adapter.lora.shared().items()
    }
    ours.set_pairs(shared)
    tokens = torch.arange(40).view(2, 20) * 5
    with torch.no_grad():
        expected, got = theirs(input_ids=tokens).logits, ours.logits(tokens)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        ours.set_pairs(None)
        assert (ours.logits(tokens) - expected).abs().max() > 1e-2
