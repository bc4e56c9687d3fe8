"""A quantized checkpoint from training to a bundle: its own codes are planned, stored in the bundle, and verified."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import coatrt
from coatrt.adapter.adapter import Adapter
from coatrt.devices.profiles import device_profile
from coatrt.engines.bundles.stored_weights import stored_weights
from coatrt.errors import ConfigError
from coatrt.models.checkpoint import Checkpoint
from coatrt.training.checkpoint_formats import checkpoint_notice
from coatrt.training.run import train
from support.quantized import Tensors, base_model, gptq, integers, value, write_quantized
from support.tiny import text_data, tiny_options

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Adapter, dict[str, torch.Tensor]]:
    where = tmp_path_factory.mktemp("gptq")
    values: dict[str, torch.Tensor] = {}

    def pack(module: str, weight: torch.Tensor) -> Tensors | None:
        if module == "lm_head":
            return None
        parts = integers(weight, 4, 64, True, torch.float16)
        values[module] = value(parts, 64)
        return gptq(parts, 4, version=1, group=64)

    model = write_quantized(base_model(where / "base", num_hidden_layers=1), where / "model", CONFIG, pack)
    options = tiny_options(formats=("nf3-g32", "int8"), steps=2, preset="none")
    adapter = train(model, text_data(model), where / "adapter", options)
    assert checkpoint_notice(Checkpoint.open(model), options) == (
        "GPTQ checkpoint: its codes are kept (7 int4-g64); formats added for it: bf16, int4-g64"
    )
    return model, adapter, values


def test_its_own_format_costs_least(trained: tuple[Path, Adapter, dict[str, torch.Tensor]]) -> None:
    _, adapter, values = trained
    description = adapter.description
    assert list(map(str, description.formats)) == ["nf3-g32", "int8", "bf16", "int4-g64"]
    for name in values:
        errors = description.sensitivity.errors[name]
        assert errors["int4-g64"] < 3e-4 < 1e-3 < errors["int8"], name  # the base is rounded to float16
        assert description.checkpoint_formats[name] == "int4-g64"
    assert description.checkpoint_formats["lm_head"] == "bf16"


def test_its_configuration_is_planned_built_and_verified(
    trained: tuple[Path, Adapter, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    model, adapter, values = trained
    plan = coatrt.plan(adapter.description, device_profile("rtx-4060"), keep=(("*", "checkpoint"),))
    assert dict(plan.config.counts) == {"int4-g64": 7, "bf16": 2}
    assert plan.predicted_loss_increase < 1e-3
    checkpoint = Checkpoint.open(model)
    target = coatrt.Target(device_profile("cpu"), plan.config, tmp_path / "bundle")
    options = coatrt.BundleOptions(context=64, engine=False)
    (result,) = coatrt.execute(coatrt.prepare(adapter.description, [target], options), adapter, checkpoint)
    weights = dict(stored_weights(result.bundle.decoder("cpu")[0], checkpoint.matrices))
    for name, exact in values.items():
        assert np.array_equal(weights[name], exact.numpy()), name
    checked = coatrt.verify(result.bundle)
    assert checked.torch_difference is not None
    assert checked.torch_difference < checked.tolerance
    assert checked.weights == 9


def test_a_pin_to_the_checkpoint_needs_one(trained: tuple[Path, Adapter, dict[str, torch.Tensor]]) -> None:
    device = device_profile("rtx-4060")
    plan = coatrt.plan(trained[1].description, device, bits=5, keep=(("down_proj", "checkpoint"),))
    assert str(plan.config["model.layers.0.mlp.down_proj"]) == "int4-g64"
    plain = replace(trained[1].description, checkpoint_formats={})
    with pytest.raises(ConfigError, match=r"=checkpoint: the adapter's model does not store .* quantized"):
        coatrt.plan(plain, device, keep=(("*", "checkpoint"),))
