"""What a bundle holds, read back by its own graph, and `verify` where codes depend on second moments."""

from pathlib import Path

import numpy as np
import pytest
import torch

from coatrt.adapter.adapter import Adapter
from coatrt.bundle import Bundle
from coatrt.configs.config import QuantConfig
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.stored_weights import stored_weights
from coatrt.engines.bundles.verify import TOLERANCE, verify
from coatrt.errors import BundleError
from coatrt.export.decoder import GraphForm, export_decoder
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.matrices import Matrix, ModelMatrices
from coatrt.quantization import code_cache as store
from coatrt.quantization.codec import decode, encode
from coatrt.quantization.input_moments import InputMoments
from coatrt.training.run import train
from support.bundles import make_bundle
from support.encoding import quantized_weight
from support.formats import random_config
from support.tiny import save_tiny_llama, text_data, tiny_options

FORMATS = ("fp16", "bf16", "int8", "int8-g32", "int4-g32", "int4-g128", "fp8", "nvfp4", "nf2-g16", "nf3-g64", "nf4-g32",
           "nf8-g64", "nf3-g32-dq4-bf16-64")  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """An adapter trained on codes of the default quantizer."""
    directory = tmp_path_factory.mktemp("refined") / "adapter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COATRT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return train(tiny_llama, text_data(tiny_llama), directory, tiny_options(steps=4, quantizer="refined"))


def mixed(adapter: Adapter) -> QuantConfig:
    return random_config(adapter.description.space, np.random.default_rng(3))


@pytest.mark.parametrize(("activations", "tied"), [("float32", True), ("float16", False)])
def test_every_format_is_read_back_bit_for_bit(tmp_path: Path, activations: str, tied: bool) -> None:
    # Widths of 48 and 80 have no whole blocks of 32 or 64.
    save_tiny_llama(
        tmp_path / "model", tied=tied, hidden_size=48, intermediate_size=80, num_hidden_layers=1, head_dim=16
    )
    checkpoint = Checkpoint.open(tmp_path / "model")
    for text in FORMATS:
        config = QuantConfig.uniform(checkpoint.matrices, text)
        export_decoder(checkpoint, config, tmp_path, forms=[GraphForm("cpu", "cpu.onnx", activations)])
        found = dict(stored_weights(tmp_path / "cpu.onnx", checkpoint.matrices))
        assert set(found) == set(checkpoint.matrices.names)
        for name, weight in found.items():
            want = decode(encode(checkpoint.tensor(f"{name}.weight"), text), getattr(torch, activations))
            np.testing.assert_array_equal(weight, want.float().numpy(), err_msg=f"{name} {text}")


def test_a_bundle_holds_the_codes_of_its_adapter(adapter: Adapter, tmp_path: Path) -> None:
    checkpoint, config = adapter.checkpoint(), mixed(adapter)
    bundle = make_bundle(adapter, config, "cpu", tmp_path / "b", BundleOptions(context=64, engine=False))
    assert adapter.description.quantizer == bundle.manifest["quantizer"] == "refined"
    assert adapter.calibration is not None
    moments = InputMoments(checkpoint, adapter.calibration)
    for name, weight in stored_weights(bundle.decoder("cpu")[0], bundle.model_matrices):
        original = checkpoint.tensor(f"{name}.weight")
        want = quantized_weight(checkpoint, name, config[name], "refined", moments)
        plain = decode(encode(original, config[name], "mse"))
        assert not np.array_equal(weight, plain.numpy())
        np.testing.assert_array_equal(weight, want.numpy(), err_msg=name)


def test_verify_needs_no_codes_of_its_own(adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine rounds the moments otherwise and gets a few other codes."""
    get = InputMoments.get

    def otherwise(self: InputMoments, name: str) -> torch.Tensor:
        moment = get(self, name)
        noise = torch.randn(moment.shape, generator=torch.Generator().manual_seed(0)) * 1e-4
        return moment * (1 + noise + noise.t())

    checkpoint, config = adapter.checkpoint(), mixed(adapter)
    with monkeypatch.context() as patch:
        patch.setattr(InputMoments, "get", otherwise)
        patch.setenv("COATRT_CACHE", str(tmp_path / "theirs"))
        made = make_bundle(adapter, config, "cpu", tmp_path / "b", BundleOptions(context=64, engine=False))
    codes = adapter.codes(checkpoint)
    other = [
        name
        for name, weight in stored_weights(made.decoder("cpu")[0], made.model_matrices)
        if not np.array_equal(weight, decode(codes.get(name, config[name])).numpy())
    ]
    assert other, "the codes are the same; the test shows nothing"
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(store, "encode", lambda *_: pytest.fail("verify encodes the model again"))
    report = verify(made)
    assert report.torch_difference is not None
    assert report.torch_difference <= TOLERANCE / 10
    assert report.weights == len(config.formats)
    assert not (tmp_path / "empty").exists()


def test_a_graph_without_the_matrix_is_refused(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    graph = bundle.decoder("cpu")[0]
    for name, said in (
        ("model.layers.9.mlp.up_proj", r"lacks model\.layers\.9\.mlp\.up_proj\.weight"),
        ("model.layers.0.mlp.up_proj", r"has shape \(160, 64\), the manifest says \(4, 4\)"),
    ):
        with pytest.raises(BundleError, match=said):
            list(stored_weights(graph, ModelMatrices((Matrix(name, 4, 4),), tied=True)))
