"""Decoder graphs against transformers: every family, prefill, decode, batches, LoRA, both forms."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import LoraContract, contract_for
from coatrt.engines.bundles.options import BundleOptions
from coatrt.errors import CheckpointError, ConfigError
from coatrt.export.decoder import GraphForm, decoder_io, export_decoder
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.families import FAMILIES, LEFT_OUT
from coatrt.models.matrices import Matrix, ModelMatrices
from coatrt.models.spec import DecoderSpec
from coatrt.quantization.codec import decode, encode
from support.families import CPU, CUDA, ENGINE, LONGROPE, MODELS, UNLIKE, Runner, export, prompts, reference, save_model

LENGTHS = [7, 12]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Checkpoint]:
    directory = tmp_path_factory.mktemp("llama")
    return save_model(directory, "llama-tied-biases"), Checkpoint.open(directory)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    model = save_model(tmp_path / "model", name)
    checkpoint = Checkpoint.open(tmp_path / "model")
    directory, ids = export(checkpoint, tmp_path / "out", (CPU, ENGINE)), prompts(96, steps=16)
    expected = [reference(model, sequence) for sequence in ids]
    for form in (CPU, ENGINE):
        got = Runner(checkpoint, directory, form).prefill_and_decode(ids, LENGTHS)
        for logits, want in zip(got, expected, strict=True):
            assert want.std() > 0.05  # the model says something
            np.testing.assert_allclose(logits, want, atol=1e-4, rtol=0)


def merge(model: Any, contract: LoraContract, lora: dict[str, Any]) -> None:
    with torch.no_grad():
        for tensor in contract.tensors:
            delta = torch.from_numpy(lora[tensor.A] @ lora[tensor.B]).T
            model.get_submodule(tensor.matrix).weight.add_(delta)


# GroupQueryAttention rotates inside only if it can: not 8 of 16 dimensions, nor before a norm, nor by longrope.
ROTATED_BEFORE = [
    "glm4",
    "hunyuan_v1_dense",
    "nemotron",
    "phi",
    "phi3-longrope-window",
    "stablelm",
    "stablelm-parallel",
]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in UNLIKE else [pytest.mark.slow]) for name in MODELS]
)
def test_the_cuda_form_equals_transformers_with_the_lora(tmp_path: Path, name: str) -> None:
    # With the weights of the test above the cpu form in float16 is up to 3e-3 away.
    model = save_model(tmp_path / "model", name, initializer_range=0.08)
    checkpoint = Checkpoint.open(tmp_path / "model")
    contract = contract_for(checkpoint.matrices, 16, 32)
    lora, ids = random_lora(contract, 0.03), prompts(96, steps=16)
    runner = Runner(checkpoint, export(checkpoint, tmp_path / "out", (ENGINE, CUDA), contract=contract), CUDA)
    named = {value.name for value in runner.session.get_inputs()}
    assert {"seqlens_k", "total_sequence_length", "logits_rows"} <= named
    assert ("position_ids" in named) == (name in ROTATED_BEFORE)
    before = reference(model, ids[0])
    merge(model, contract, lora)
    for got, sequence in zip(runner.prefill_and_decode(ids, LENGTHS, lora), ids, strict=True):
        want = reference(model, sequence)
        tolerance = 1e-2 if "gemma" in name else 3e-3  # its many norms raise float16's rounding
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max()
    assert np.abs(reference(model, ids[0]) - before).max() > 0.02


def test_every_family_is_tested() -> None:
    assert {name.split("-")[0] for name in MODELS} == set(FAMILIES)


def test_a_batch_equals_each_sequence_alone(tmp_path: Path, llama: tuple[Any, Checkpoint]) -> None:
    runner = Runner(llama[1], export(llama[1], tmp_path))
    ids = prompts(96)
    together = runner.prefill_and_decode(ids, LENGTHS)
    for sequence, length, got in zip(ids, LENGTHS, together, strict=True):
        np.testing.assert_allclose(runner.prefill_and_decode([sequence], [length])[0], got, atol=1e-5, rtol=0)


def test_prefill_in_pieces_equals_prefill_at_once(tmp_path: Path, llama: tuple[Any, Checkpoint]) -> None:
    runner = Runner(llama[1], export(llama[1], tmp_path))
    ids = prompts(96)[1][None]
    runner.start(1)
    whole = runner.step(ids, np.array([0]), np.arange(17)[None])
    runner.start(1)
    first = runner.step(ids[:, :6], np.array([0]), np.array([[5]]))
    second = runner.step(ids[:, 6:], np.array([6]), np.array([[10, 0]]))
    np.testing.assert_allclose(first[0, 0], whole[0, 5], atol=1e-5, rtol=0)
    np.testing.assert_allclose(second[0], whole[0, [16, 6]], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "fmt", ["bf16", "int8", "int8-g64", "int4-g32", "fp8", "nvfp4", "nf3-g16", "nf4-g16-dq4-bf16-64"]
)
def test_quantized_model_equals_decoded_model(tmp_path: Path, llama: tuple[Any, Checkpoint], fmt: str) -> None:
    model = save_model(tmp_path / "model", "llama-tied-biases")
    checkpoint = Checkpoint.open(tmp_path / "model")
    with torch.no_grad():
        for name in checkpoint.matrices.names:
            weight = model.get_submodule(name).weight
            weight.copy_(decode(encode(weight, fmt)))
    forms = (CPU,) if fmt == "nvfp4" else (CPU, ENGINE)  # ONNX Runtime has no FP4
    directory = export(checkpoint, tmp_path / "out", forms, fmt)
    ids = prompts(96)
    for form in forms:
        got = Runner(checkpoint, directory, form).prefill_and_decode(ids, LENGTHS)
        for logits, sequence in zip(got, ids, strict=True):
            np.testing.assert_allclose(logits, reference(model, sequence), atol=2e-4, rtol=0)


def random_lora(contract: LoraContract, scale: float) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {name: (rng.standard_normal(shape) * scale).astype(np.float32) for name, shape in contract.shapes.items()}


@pytest.mark.parametrize("form", [CPU, CUDA], ids=lambda form: form.name)
@pytest.mark.parametrize("fmt", ["fp16", "int4-g32"])
def test_zero_lora_equals_the_graph_without_bit_for_bit(
    tmp_path: Path, llama: tuple[Any, Checkpoint], fmt: str, form: GraphForm
) -> None:
    checkpoint = llama[1]
    contract = contract_for(checkpoint.matrices, 16, 32)
    ids = prompts(96)
    without = export(checkpoint, tmp_path / "plain", (form,), fmt)
    plain = Runner(checkpoint, without, form).prefill_and_decode(ids, LENGTHS)
    runner = Runner(checkpoint, export(checkpoint, tmp_path / "lora", (form,), fmt, contract), form)
    zero = runner.prefill_and_decode(ids, LENGTHS, random_lora(contract, 0.0))
    for got, want in zip(zero, plain, strict=True):
        np.testing.assert_array_equal(got, want)


def test_lora_equals_the_merged_model(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen2")
    checkpoint = Checkpoint.open(tmp_path / "model")
    contract = contract_for(checkpoint.matrices, 16, 32)
    lora = random_lora(contract, 0.05)
    runner = Runner(checkpoint, export(checkpoint, tmp_path / "out", contract=contract))
    ids = prompts(96)
    before = reference(model, ids[0])
    got = runner.prefill_and_decode(ids, LENGTHS, lora)
    merge(model, contract, lora)
    for logits, sequence in zip(got, ids, strict=True):
        np.testing.assert_allclose(logits, reference(model, sequence), atol=1e-4, rtol=0)
    assert np.abs(got[0] - before).max() > 0.1


def test_inputs_and_outputs_are_those_of_the_contract(tmp_path: Path, llama: tuple[Any, Checkpoint]) -> None:
    checkpoint = llama[1]
    contract = contract_for(checkpoint.matrices, 16, 32)
    session = Runner(checkpoint, export(checkpoint, tmp_path, (ENGINE,), contract=contract), ENGINE).session
    io = decoder_io(checkpoint, ENGINE)
    pairs = [
        f"lora_{part}.model.layers.{layer}.{name}_proj"
        for layer in range(3)
        for name in ("self_attn.qkv", "self_attn.o", "mlp.gate_up", "mlp.down")
        for part in "AB"
    ]
    names = ["input_ids", "position_ids", "write_index", "logits_index", *io.past_names, *pairs]
    assert [value.name for value in session.get_inputs()] == names
    shapes = {value.name: tuple(value.shape) for value in session.get_inputs()}
    assert shapes["past_key_values.0.key"] == ("B", 2, 48, 16)
    assert {name: shapes[name] for name in pairs} == contract.inputs
    outputs = {value.name: tuple(value.shape) for value in session.get_outputs()}
    assert outputs == {"logits": ("B", "T", 96)} | dict.fromkeys(io.present_names, ("B", 2, 48, 16))
    assert (io.layers, io.kv_heads, io.head_dim, io.vocabulary, io.cache_length) == (3, 2, 16, 96, 48)
    assert io.max_positions == 48
    assert decoder_io(checkpoint, CPU).max_positions == 64


def test_positions_follow_the_context_as_far_as_the_model_goes(tmp_path: Path, llama: tuple[Any, Checkpoint]) -> None:
    checkpoint = llama[1]
    long = replace(checkpoint, config={**checkpoint.config, "max_position_embeddings": 131072})
    for context, open_caches in ((2048, 32768), (65536, 65536), (131072, 131072)):
        engine, cpu, cuda = BundleOptions(context=context).forms()
        io = decoder_io(long, engine)
        assert (io.cache_length, io.max_positions) == (context, context)
        assert decoder_io(long, cpu).max_positions == decoder_io(long, cuda).max_positions == open_caches
    form = GraphForm("engine", "base.onnx", "float32", 65)
    for refuse in (lambda: decoder_io(checkpoint, form), lambda: export(checkpoint, tmp_path, (form,))):
        with pytest.raises(
            ConfigError, match="context must be at most 64, the positions of the model, got 65; give --context 64"
        ):
            refuse()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "recurrent state.*allowed: apertus, arcee"),
        ({"model_type": None}, "allowed: apertus"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic' cannot be"),
        ({"rope_parameters": LONGROPE | {"short_factor": None}}, "not a valid llama|missing or invalid"),
        (
            {"model_type": "qwen3_moe"},
            r"model_type qwen3_moe cannot be exported \(a mixture of experts\); allowed: apertus",
        ),
        ({"model_type": "new", "num_experts": 8}, r"model_type new cannot be exported \(a mixture of experts\)"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"num_hidden_layers": "three"}, "not a valid llama configuration"),
    ],
)
def test_spec_refuses(llama: tuple[Any, Checkpoint], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        DecoderSpec.from_config({**llama[1].config, **changes})


def test_every_causal_model_of_transformers_is_exported_or_named_as_left_out() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    assert not set(FAMILIES) & set(LEFT_OUT)
    assert set(KNOWN) <= {*FAMILIES, *LEFT_OUT}


@pytest.mark.parametrize("family", LEFT_OUT)
def test_what_is_left_out_is_refused_in_one_line(family: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        DecoderSpec.from_config({"model_type": family})
    assert f"model_type {family} cannot be exported ({LEFT_OUT[family]})" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", [CPU, ENGINE, CUDA], ids=lambda form: form.name)
def test_a_sequence_that_outgrows_longrope_changes_its_frequencies_as_in_transformers(
    tmp_path: Path, form: GraphForm
) -> None:
    rope = LONGROPE | {"original_max_position_embeddings": 20, "partial_rotary_factor": 0.75}
    model = save_model(
        tmp_path / "model", "phi3-longrope-window", rope_parameters=rope, original_max_position_embeddings=20
    )
    checkpoint = Checkpoint.open(tmp_path / "model")
    (ids,) = prompts(96, (12,), 16)  # longer than 20 from the ninth step on
    (got,) = Runner(checkpoint, export(checkpoint, tmp_path / "out", (form,)), form).prefill_and_decode([ids], [12])
    with torch.no_grad():
        out = model(torch.tensor(ids[:12])[None], use_cache=True)
        want, cache = [out.logits[0]], out.cache
        for token in ids[12:]:
            out = model(torch.tensor([[token]]), cache=cache, use_cache=True)
            want, cache = [*want, out.logits[0]], out.cache
    tolerance = 1e-4 if form.activations == "float32" else 2e-2
    np.testing.assert_allclose(got, torch.cat(want).numpy(), atol=tolerance, rtol=0)
    assert np.abs(got[-1] - reference(model, ids)[-1]).max() > 0.1  # the first keys were short


def test_heads_that_onnx_runtime_cannot_take_are_refused_by_the_cpu_form(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama", head_dim=12)
    checkpoint = Checkpoint.open(tmp_path / "model")
    export(checkpoint, tmp_path / "engine", (ENGINE,))
    with pytest.raises(CheckpointError, match=r"head_dim must be a multiple of 8 for the cpu form .*, got 12"):
        export(checkpoint, tmp_path / "cpu")
    assert not list((tmp_path / "cpu").iterdir())


def test_a_checkpoint_with_unused_tensors_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors .* like model\.layers\.0\.self_attn\.sinks"):
        export(Checkpoint.open(tmp_path), tmp_path / "out")


def test_export_refuses_what_does_not_fit(tmp_path: Path, llama: tuple[Any, Checkpoint]) -> None:
    checkpoint = llama[1]
    good = QuantConfig.uniform(checkpoint.matrices, "fp16")
    short = QuantConfig({"model.embed_tokens": good["model.embed_tokens"]})
    with pytest.raises(ConfigError, match=r"differ in model\S+ and 20 more matrices"):
        export_decoder(checkpoint, short, tmp_path, forms=[CPU])
    other = contract_for(ModelMatrices((Matrix("model.layers.0.mlp.up_proj", 8, 8),), True), 16, 16)
    with pytest.raises(ConfigError, match="1 target modules differ from the model's 21"):
        export_decoder(checkpoint, good, tmp_path, forms=[CPU], contract=other)
    with pytest.raises(ConfigError, match="no graph form to write"):
        export_decoder(checkpoint, good, tmp_path, forms=[])
    with pytest.raises(ConfigError, match="its own name and file, got 1 for 2 forms"):
        export_decoder(checkpoint, good, tmp_path, forms=[CPU, CPU])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpu", "a", "float32", 8), "graph form must be one of engine, cpu, cuda, got 'gpu'"),
        (("cuda", "a", "float32", 8), "must be one of float16, got float32"),
        (("cpu", "a", "bfloat16", 8), "must be one of float32, float16, got bfloat16"),
        (("engine", "a", "int8", 8), "must be one of float32, float16, bfloat16, got int8"),
        (("engine", "a", "float16", None), "needs a fixed cache length"),
        (("cpu", "a", "float32", 0), "must be at least 1, got 0"),
    ],
)
def test_graph_form_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GraphForm(*arguments)
