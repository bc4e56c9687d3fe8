"""A bundle of every kind of family that is unlike Llama: trained, planned, built, its numbers verified, run."""

from pathlib import Path

import pytest

from coatrt.adapter.adapter import Adapter
from coatrt.devices.profiles import device_profile
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.verify import TOLERANCE, verify
from coatrt.engines.runtime.generate import generate
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.planning.plan import PlanRequest
from coatrt.planning.planner import plan
from coatrt.training.run import train
from support.bundles import make_bundle
from support.families import save_model
from support.tiny import TEXTS, save_byte_tokenizer, text_data, tiny_options

CONTEXT = 64


@pytest.mark.parametrize(
    "name",
    [
        "gemma3_text",
        "phi3-longrope-window",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("arcee", "cohere", "gemma2", "glm4", "phi", "apertus")
        ),
    ],
)
def test_a_family_goes_all_the_way(name: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_model(model, name, vocab_size=272, eos_token_id=256, hidden_size=64)
    save_byte_tokenizer(model)
    options = tiny_options(formats=("int4-g32", "int8"), quantizer="feedback", steps=2)
    train(model, text_data(model, TEXTS[:4]), tmp_path / "adapter", options)
    adapter = Adapter.from_pretrained(tmp_path / "adapter")
    request = PlanRequest(bits=6.0, context=CONTEXT, prefill=32)
    chosen = plan(adapter.description, device_profile("rtx-4060"), request)
    assert set(map(str, chosen.config.formats.values())) == {"int4-g32", "int8"}
    built = BundleOptions.of(request, engine=False)
    bundle = make_bundle(adapter, chosen.config, "rtx-4060", tmp_path / "bundle", built, chosen)
    report = verify(bundle)
    assert report.torch_difference is not None
    assert report.torch_difference <= TOLERANCE
    assert report.lora_effect > 0.001
    decoder = load_decoder(bundle)
    decoder.set_lora(load_lora(bundle.path("lora.safetensors"), bundle.contract))
    (text,) = generate(decoder, [[1, 2, 3, 4, 5]], max_tokens=20, stop=[])
    assert len(text.tokens) == 20
