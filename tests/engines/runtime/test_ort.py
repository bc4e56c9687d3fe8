"""The ONNX Runtime decoder against torch: LoRA, batches, the caches in place, generation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from coatrt.adapter.adapter import Adapter
from coatrt.bundle import Bundle
from coatrt.configs.config import QuantConfig
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.generate import Generation, encode_prompt, generate
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.ort import OrtDecoder
from coatrt.engines.runtime.sampling import Sampling, next_token, probabilities
from coatrt.errors import ConfigError
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.export.decoder import GraphForm, decoder_io, export_decoder
from coatrt.quantization.code_cache import CodeStore
from support.formats import random_config

PROMPT = [5, 77, 130, 9, 41, 200, 13]
STEPS = 16
UNIFORM = ("nf3-g32", "int4-g32", "nvfp4", "fp8", "int8", "nf4-g32-dq8-fp16-64", "fp16", "bf16", "int8-g32", "int4-g64",
           "int4-g128", "nf2-g16", "nf2-g64-dq4-bf16-256", "nf8-g64")  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tiny_adapter: Path) -> Adapter:
    return Adapter.from_pretrained(tiny_adapter)


@pytest.fixture(scope="module")
def reference(adapter: Adapter) -> FakeQuantModel:
    checkpoint = adapter.checkpoint()
    return FakeQuantModel(checkpoint, CodeStore(checkpoint))


def decoder_of(adapter: Adapter, config: QuantConfig, directory: Path, batch: int = 1) -> OrtDecoder:
    form = GraphForm("cpu", "cpu.onnx", "float32")
    checkpoint = adapter.checkpoint()
    export_decoder(checkpoint, config, directory, forms=[form], contract=adapter.description.contract)
    return OrtDecoder(
        directory / "cpu.onnx",
        decoder_io(checkpoint, form),
        adapter.description.contract,
        RuntimeOptions(batch=batch, context=64, threads=1, accuracy_level=0),
    )


def configs(adapter: Adapter) -> list[QuantConfig]:
    rng = np.random.default_rng(21)
    return [adapter.description.space.uniform(text) for text in UNIFORM] + [
        random_config(adapter.description.space, rng) for _ in range(5)
    ]


@pytest.mark.parametrize("case", range(len(UNIFORM) + 5))
def test_logits_equal_torch_with_the_lora(
    adapter: Adapter, reference: FakeQuantModel, tmp_path: Path, case: int
) -> None:
    config = configs(adapter)[case]
    lora = adapter.emit(
        config if adapter.description.space.contains(config) else adapter.description.space.uniform("int8")
    )
    decoder = decoder_of(adapter, config, tmp_path)
    decoder.set_lora({name: tensor.numpy() for name, tensor in lora.items()})
    logits, tokens = [decoder.prefill([PROMPT])[0]], []
    for _ in range(STEPS):
        tokens.append(int(logits[-1].argmax()))
        logits.append(decoder.decode([tokens[-1]])[0])
    reference.set_config(config)
    reference.set_lora(adapter.description.contract, lora)
    with torch.no_grad():
        expected = reference.logits(torch.tensor([PROMPT + tokens]))[0, len(PROMPT) - 1 :].numpy()
    assert np.abs(np.stack(logits) - expected).max() <= 1e-4 * np.abs(expected).max()
    reference.set_pairs(None)
    with torch.no_grad():
        plain = reference.logits(torch.tensor([PROMPT]))[0, -1].numpy()
    decoder.set_lora(None)
    assert np.abs(decoder.prefill([PROMPT])[0] - plain).max() <= 1e-4 * np.abs(plain).max()
    assert np.abs(plain - expected[0]).max() > 1e-2 * np.abs(plain).max()  # the LoRA is live


def test_zeros_equal_the_base_bit_for_bit(adapter: Adapter, tmp_path: Path) -> None:
    config = random_config(adapter.description.space, np.random.default_rng(4))
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    decoder = decoder_of(adapter, config, tmp_path / "with")
    form, checkpoint = GraphForm("cpu", "cpu.onnx", "float32"), adapter.checkpoint()
    export_decoder(checkpoint, config, tmp_path / "without", forms=[form])
    base = OrtDecoder(
        tmp_path / "without" / "cpu.onnx",
        decoder_io(checkpoint, form),
        None,
        RuntimeOptions(context=64, threads=1, accuracy_level=0),
    )
    assert np.array_equal(decoder.prefill([PROMPT]), base.prefill([PROMPT]))
    for token in (3, 250, 17):
        assert np.array_equal(decoder.decode([token]), base.decode([token]))
    with pytest.raises(ConfigError, match="no LoRA inputs"):
        base.set_lora({})


def test_a_batch_of_unequal_prompts_equals_each_alone(adapter: Adapter, tmp_path: Path) -> None:
    config = configs(adapter)[-1]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (decoder_of(adapter, config, tmp_path / name, batch) for name, batch in (("one", 1), ("two", 2)))
    lora = {name: tensor.numpy() for name, tensor in adapter.emit(config).items()}
    one.set_lora(lora)
    two.set_lora(lora)
    prompts = [PROMPT, [8, 8, 120]]
    together = generate(two, prompts, max_tokens=STEPS)
    assert [generate(one, [prompt], max_tokens=STEPS)[0] for prompt in prompts] == together
    batched = two.prefill(prompts)
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(batched[row], one.prefill([prompt])[0], atol=1e-4)


def test_pieces_of_several_prompts_are_refused(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    two, start = np.ones((2, 3), np.int64), np.array([0, 4])
    decoder = load_decoder(bundle, RuntimeOptions(batch=2, context=32, threads=1))
    assert isinstance(decoder, OrtDecoder)
    with pytest.raises(ConfigError, match="cannot append 3 tokens at once to a batch of 2"):
        decoder.run(two, start, np.zeros((2, 1), np.int64))
    alone = load_decoder(bundle, RuntimeOptions(batch=1, context=32, threads=1))
    assert isinstance(alone, OrtDecoder)
    whole = alone.prefill([[5, 6, 7, 8, 9]])
    alone.run(np.array([[5, 6]]), np.array([0]), np.array([[1]]))
    pieces = alone.run(np.array([[7, 8, 9]]), np.array([2]), np.array([[2]]))[:, 0]
    np.testing.assert_allclose(pieces, whole, atol=1e-4 * np.abs(whole).max())


def test_caches_stay_where_they_are(tiny_bundle: Path) -> None:
    decoder = load_decoder(Bundle.open(tiny_bundle), RuntimeOptions(context=32, threads=1))
    assert isinstance(decoder, OrtDecoder)
    before = [cache.data_ptr() for cache in decoder._caches]
    assert len(set(before)) == 2 * decoder.io.layers
    decoder.prefill([PROMPT])
    keys = decoder._caches[0].numpy().copy()
    assert np.abs(keys[0, :, : len(PROMPT)]).min(axis=-1).max() > 0
    decoder.decode([1])
    assert [cache.data_ptr() for cache in decoder._caches] == before
    after = decoder._caches[0].numpy()
    assert np.array_equal(after[0, :, : len(PROMPT)], keys[0, :, : len(PROMPT)])
    assert not np.array_equal(after[0, :, len(PROMPT)], keys[0, :, len(PROMPT)])
    assert decoder.lengths.tolist() == [len(PROMPT) + 1]


def test_greedy_equals_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from coatrt.models.checkpoint import Checkpoint

    checkpoint, form = Checkpoint.open(tiny_llama), GraphForm("cpu", "cpu.onnx", "float32")
    export_decoder(checkpoint, QuantConfig.uniform(checkpoint.matrices, "bf16"), tmp_path, forms=[form])
    decoder = OrtDecoder(
        tmp_path / "cpu.onnx",
        decoder_io(checkpoint, form),
        None,
        RuntimeOptions(context=64, threads=1, accuracy_level=0),
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    (found,) = generate(decoder, [PROMPT], max_tokens=20)
    assert list(found.tokens) == expected[0, len(PROMPT) :].tolist()
    stop = found.tokens[7]
    first = found.tokens.index(stop)
    assert generate(decoder, [PROMPT], max_tokens=20, stop=[stop]) == [Generation(found.tokens[:first], "stop")]


def test_generation_ends_at_the_capacity(tiny_bundle: Path) -> None:
    decoder = load_decoder(Bundle.open(tiny_bundle), RuntimeOptions(context=12, threads=1))
    (made,) = generate(decoder, [PROMPT], max_tokens=100)
    assert made.reason == "length"
    assert len(PROMPT) + len(made.tokens) - 1 == decoder.capacity == 12
    loaded = r"13 positions needed, the decoder has 12: it was loaded with that context; .*, or load it with a longer"
    with pytest.raises(ConfigError, match=loaded):
        decoder.prefill([[1] * 13])
    for token in (272, -1):
        with pytest.raises(ConfigError, match=f"token id {token} is outside the vocabulary of 272"):
            decoder.prefill([[5, token, 7]])
    with pytest.raises(ConfigError, match="empty prompt"):
        decoder.prefill([[]])
    with pytest.raises(ConfigError, match="got 2 sequences for a decoder of batch 1"):
        decoder.prefill([[1], [2]])
    for wrong, said in (
        ({"backend": "gpu"}, "one of ort, trt, cuda"),
        ({"context": 0}, "at least 1, got 0"),
        ({"context": 2.5}, "got 2.5"),
        ({"threads": "2"}, "got '2'"),
        ({"accuracy_level": True}, "one of 0, 1, 4"),
    ):
        with pytest.raises(ConfigError, match=said):
            RuntimeOptions(**wrong)  # type: ignore[arg-type]


def test_rows_of_a_batch_end_on_their_own(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(1, 250, length).tolist() for length in (36, 2, 20, 40)]
    together, alone = (load_decoder(bundle, RuntimeOptions(batch=batch, context=40, threads=1)) for batch in (4, 1))
    lora = load_lora(bundle.path("lora.safetensors"), bundle.contract)
    together.set_lora(lora)
    alone.set_lora(lora)
    expected = [generate(alone, [prompt], max_tokens=30)[0] for prompt in prompts]
    assert [len(row.tokens) for row in expected] == [5, 30, 21, 1]
    made: list[list[int]] = [[], [], [], []]
    assert generate(together, prompts, max_tokens=30, on_token=lambda row, token: made[row].append(token)) == expected
    assert made == [list(row.tokens) for row in expected]
    stop = [expected[1].tokens[20], expected[2].tokens[3]]
    stopped = [generate(alone, [prompt], max_tokens=30, stop=stop)[0] for prompt in prompts]
    assert "stop" in {row.reason for row in stopped}
    assert generate(together, prompts, max_tokens=30, stop=stop) == stopped


def test_a_sequence_that_rests_goes_on_as_if_alone(tiny_bundle: Path) -> None:
    bundle, prompts = Bundle.open(tiny_bundle), [PROMPT, [8, 8]]
    two, one = (load_decoder(bundle, RuntimeOptions(batch=batch, context=12, threads=1)) for batch in (2, 1))
    two.prefill(prompts)
    for token in (3, 4, 5, 6, 7):
        two.decode([token, None])
    assert two.lengths.tolist() == [12, 2]
    for token in (9, 10, 11):  # beside a full sequence
        found = two.decode([None, token])[1]
    assert two.lengths.tolist() == [12, 5]
    one.prefill([[8, 8]])
    expected = [one.decode([token])[0] for token in (9, 10, 11)][-1]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ConfigError, match="13 positions needed"):
        two.decode([1, None])


def test_sampling_follows_temperature_top_k_and_top_p() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    plain = probabilities(logits, Sampling(1.0))
    np.testing.assert_allclose(plain, [0.5, 0.25, 0.15, 0.1], rtol=1e-6)
    sharp = np.array([0.5, 0.25, 0.15, 0.1]) ** 2
    np.testing.assert_allclose(probabilities(logits, Sampling(0.5)), sharp / sharp.sum(), rtol=1e-6)
    np.testing.assert_allclose(probabilities(logits, Sampling(1.0, top_k=2)), [2 / 3, 1 / 3, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(probabilities(logits, Sampling(1.0, top_p=0.7)), [2 / 3, 1 / 3, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(probabilities(logits, Sampling(1.0, top_p=0.4)), [1, 0, 0, 0], rtol=1e-6)
    rng = np.random.default_rng(0)
    drawn = np.bincount([next_token(logits, Sampling(1.0), rng) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(drawn, plain, atol=4 * 0.5 / 4000**0.5)
    assert next_token(logits, Sampling(), rng) == 0


def test_sampled_text_is_a_function_of_its_seed(tiny_bundle: Path) -> None:
    decoder = load_decoder(Bundle.open(tiny_bundle), RuntimeOptions(context=64, threads=1))
    first, again, other = (
        generate(decoder, [PROMPT], max_tokens=12, sampling=Sampling(1.5, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_sampled_rows_of_a_batch_do_not_depend_on_each_other(tiny_bundle: Path) -> None:
    bundle, sampling = Bundle.open(tiny_bundle), Sampling(1.5, seed=3)
    three = generate(
        load_decoder(bundle, RuntimeOptions(batch=3, context=64, threads=1)),
        [PROMPT] * 3,
        max_tokens=12,
        sampling=sampling,
    )
    two = load_decoder(bundle, RuntimeOptions(batch=2, context=64, threads=1))
    first = generate(two, [PROMPT] * 2, max_tokens=12, sampling=sampling)
    assert len({row.tokens for row in three}) == 3
    assert first == three[:2]
    stop = next(token for token in three[0].tokens[:8] if token not in three[1].tokens)
    ended = generate(two, [PROMPT] * 2, max_tokens=12, sampling=sampling, stop=[stop])
    assert ended[0].tokens == three[0].tokens[: three[0].tokens.index(stop)]
    assert ended[1] == three[1]  # it goes on as it did, though the first row has ended


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}])
def test_sampling_refuses_nonsense(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"must be .*, got (-1|-1\.0|0\.0|1\.5)$"):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_chat_template_and_plain_prompts(tiny_bundle: Path) -> None:
    from coatrt.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Bundle.open(tiny_bundle).folder("tokenizer"))
    assert tokenizer.decode(encode_prompt(tokenizer, "hé")) == "hé"
    chat = tokenizer.decode(encode_prompt(tokenizer, "hi", chat=True, system="be brief"))
    assert chat == "[system] be brief\n[user] hi\n[assistant] "
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role\nnot supported') }}{% endif %}hi"
    )
    assert encode_prompt(tokenizer, "hi", chat=True)
    refused = r"refuses the prompt \(System role not supported\); run without --system"
    with pytest.raises(ConfigError, match=refused):
        encode_prompt(tokenizer, "hi", chat=True, system="be brief")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        encode_prompt(tokenizer, "hi", chat=True)


def test_emitter_equals_torch_and_refuses_unknown_formats(tiny_bundle: Path, adapter: Adapter) -> None:
    bundle = Bundle.open(tiny_bundle)
    emitter = Emitter.of(bundle, threads=1)
    config = random_config(adapter.description.space, np.random.default_rng(8))
    emitted, expected = emitter.emit(config), adapter.emit(config)
    assert list(emitted) == list(expected)
    for name, value in emitted.items():
        np.testing.assert_allclose(value, expected[name].numpy(), atol=1e-5)
    own = load_lora(bundle.path("lora.safetensors"), bundle.contract)
    for name, value in emitter.emit(bundle.config).items():
        np.testing.assert_array_equal(value, own[name])
    with pytest.raises(ConfigError, match="is int8-g64, which the adapter was not trained for"):
        emitter.emit(adapter.description.space.uniform("int8-g64"))
