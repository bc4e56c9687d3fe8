"""An exported bundle in onnxruntime-genai computes and writes what coatrt's own decoder does."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from coatrt.bundle import Bundle, seal
from coatrt.configs.config import QuantConfig
from coatrt.engines.genai.destination import SUMS
from coatrt.engines.genai.export import export_genai
from coatrt.engines.genai.options import GenaiOptions
from coatrt.engines.runtime.cuda import CudaDecoder
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.generate import encode_prompt, generate
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.errors import BundleError, ConfigError
from coatrt.models.config_file import read_config

PROMPTS = ("cat the cat sat", "owl the", "The bee sat on the mat. fox")
TOKENS = 24


class Model:
    """A directory in onnxruntime-genai, on the CPU."""

    def __init__(self, og: Any, directory: Path) -> None:
        self.og, self.directory = og, directory
        config = og.Config(str(directory))
        config.clear_providers()
        self.model = og.Model(config)
        self.tokenizer = og.Tokenizer(self.model)
        self.adapters = og.Adapters(self.model)
        self._loaded: set[str] = set()

    def start(self, ids: Sequence[int], adapter: str = "", tokens: int = TOKENS, **options: Any) -> Any:
        """Return a generator that has read a prompt."""
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(max_length=len(ids) + tokens)
        if "speculative" in options:
            params.set_speculative_options(**options["speculative"])
        if "regex" in options:
            params.set_guidance("regex", options["regex"])
        generator = self.og.Generator(self.model, params)
        if adapter:
            if adapter not in self._loaded:
                self.adapters.load(str(self.directory / "adapters" / f"{adapter}.onnx_adapter"), adapter)
                self._loaded.add(adapter)
            generator.set_active_adapter(self.adapters, adapter)
        generator.append_tokens(list(ids))
        return generator

    def finish(self, generator: Any, ids: Sequence[int]) -> list[int]:
        """Return what it generates."""
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(ids) :]]


def without_end(tokens: list[int], stops: Sequence[int]) -> list[int]:
    return tokens[:-1] if tokens[-1] in stops else tokens


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def model(og: Any, exported: Path) -> Model:
    return Model(og, exported)


@pytest.fixture(scope="module")
def every(og: Any, every_logit: Path) -> Model:
    return Model(og, every_logit)


def prompts(bundle: Bundle) -> list[list[int]]:
    return [encode_prompt(bundle.tokenizer(), text) for text in PROMPTS]


@pytest.mark.parametrize("adapter", ["", "lora", "none"])
def test_logits_and_text_are_those_of_run(adapter: str, model: Model, bundle: Bundle) -> None:
    stops = bundle.manifest["model"]["stop_tokens"]
    decoder = load_decoder(bundle, context=96)
    decoder.set_lora(None if adapter == "none" else load_lora(bundle.path("lora.safetensors"), bundle.contract))
    for text, ids in zip(PROMPTS, prompts(bundle), strict=True):
        assert [int(token) for token in model.tokenizer.encode(text)] == ids
        generator = model.start(ids, adapter)
        logits = generator.get_output("logits")
        assert logits.shape == (1, 1, 272)
        assert np.abs(logits[0, 0] - decoder.prefill([ids])[0]).max() < 1e-4
        (expected,) = generate(decoder, [ids], max_tokens=TOKENS, stop=stops)
        assert without_end(model.finish(generator, ids), stops) == list(expected.tokens)


def test_the_lora_changes_the_logits_and_off_leaves_it_to_adapters(
    model: Model, og: Any, bundle: Bundle, tmp_path: Path
) -> None:
    ids = prompts(bundle)[0]
    with_lora, without = (model.start(ids, name).get_output("logits") for name in ("lora", "none"))
    assert np.abs(with_lora - without).max() > 0.01
    off = export_genai(bundle, tmp_path / "off", GenaiOptions(provider="cpu", lora="off"))
    assert off.adapters == ("lora",)
    other = Model(og, off.directory)
    assert np.array_equal(other.start(ids).get_output("logits"), without)
    assert np.array_equal(other.start(ids, "lora").get_output("logits"), with_lora)
    assert np.array_equal(other.start(ids).get_output("logits"), without)


def test_the_adapter_of_another_configuration(og: Any, bundle: Bundle, tmp_path: Path) -> None:
    config = QuantConfig.uniform(bundle.model_matrices, "int8")
    export = export_genai(bundle, tmp_path / "two", GenaiOptions(provider="cpu"), adapters={"int8": config})
    assert export.adapters == ("int8", "lora", "none")
    decoder, ids = load_decoder(bundle, context=96), prompts(bundle)[0]
    decoder.set_lora(dict(Emitter.of(bundle).emit(config)))
    found = Model(og, export.directory).start(ids, "int8").get_output("logits")[0, 0]
    assert np.abs(found - decoder.prefill([ids])[0]).max() < 1e-4
    decoder.set_lora(Emitter.of(bundle).emit(bundle.config))
    assert np.abs(found - decoder.prefill([ids])[0]).max() > 1e-3


def test_logits_of_every_token(every: Model, bundle: Bundle) -> None:
    ids, decoder = prompts(bundle)[2], load_decoder(bundle, context=96, accuracy_level=0)
    decoder.set_lora(load_lora(bundle.path("lora.safetensors"), bundle.contract))
    expected = np.stack([decoder.prefill([ids[: i + 1]])[0] for i in range(len(ids))])
    logits = every.start(ids).get_output("logits")
    assert logits.shape == (1, len(ids), 272)
    assert np.abs(logits[0] - expected).max() < 1e-4


def test_unequal_prompts_together(model: Model, bundle: Bundle) -> None:
    decoder, rows = load_decoder(bundle, context=96, batch=3), prompts(bundle)
    decoder.set_lora(load_lora(bundle.path("lora.safetensors"), bundle.contract))
    expected = generate(decoder, rows, max_tokens=8)
    params, width = model.og.GeneratorParams(model.model), max(map(len, rows))
    params.set_search_options(max_length=width + 8, batch_size=3)
    generator = model.og.Generator(model.model, params)
    generator.append_tokens(model.tokenizer.encode_batch(list(PROMPTS)))
    while not generator.is_done():
        generator.generate_next_token()
    for row, result in enumerate(expected):
        assert [int(token) for token in generator.get_sequence(row)[width:]] == list(result.tokens)


def test_chat_streaming_and_a_second_turn(every: Model, bundle: Bundle) -> None:
    tokenizer, turns = bundle.tokenizer(), [{"role": "user", "content": "the hen"}]
    text = every.tokenizer.apply_chat_template(json.dumps(turns), add_generation_prompt=True)
    ids = encode_prompt(tokenizer, "the hen", chat=True)
    assert [int(token) for token in every.tokenizer.encode(text)] == ids
    generator, stream, pieces = every.start(ids, tokens=40), every.tokenizer.create_stream(), []
    for _ in range(10):
        generator.generate_next_token()
        pieces.append(stream.decode(generator.get_next_tokens()[0]))
    first = [int(token) for token in generator.get_sequence(0)[len(ids) :]]
    assert "".join(pieces) == tokenizer.decode(first)
    more = encode_prompt(tokenizer, " mat. ")
    generator.rewind_to(len(ids) + 9)  # a last token that ended nothing has not been computed yet
    generator.append_tokens([first[-1], *more])
    logits = generator.get_output("logits")[0, -1]
    decoder = load_decoder(bundle, context=96, accuracy_level=0)
    decoder.set_lora(load_lora(bundle.path("lora.safetensors"), bundle.contract))
    assert np.abs(logits - decoder.prefill([[*ids, *first, *more]])[0]).max() < 1e-4


def test_constrained_decoding(model: Model, bundle: Bundle) -> None:
    ids = prompts(bundle)[0]
    tokens = model.finish(model.start(ids, regex="[0-9]{3}-[ab]{1,4}x"), ids)
    text = bundle.tokenizer().decode(tokens, skip_special_tokens=True)
    digits, _, letters = text.partition("-")
    assert len(digits) == 3 and digits.isdigit() and letters.endswith("x")
    assert 1 <= len(letters[:-1]) <= 4 and set(letters[:-1]) <= {"a", "b"}


def test_n_gram_speculation_needs_every_logit_and_changes_no_token(every: Model, model: Model, bundle: Bundle) -> None:
    ids, options = prompts(bundle)[0], {"ngram_size": 3, "max_draft_tokens": 4}
    generator = every.start(ids, speculative=options)
    assert every.finish(generator, ids) == every.finish(every.start(ids), ids)
    assert generator.get_speculative_stats()["draft_tokens_accepted"] > 0
    with pytest.raises(RuntimeError, match="logits"):
        model.start(ids, speculative=options)


def test_an_engine_serves_requests_together(every: Model, bundle: Bundle) -> None:
    og, engine, requests = every.og, every.og.Engine(every.model), []
    for ids in prompts(bundle):
        requests.append(engine.create_request())
        options = og.TurnOptions(requests[-1])
        options.set_max_generated_tokens(6)
        options.set_do_sample(False)
        requests[-1].begin_turn(np.array(ids, np.int32), options)
    buffer, found = engine.create_event_buffer(64), [list[int]() for _ in requests]
    while engine.has_pending_requests():
        for event in engine.run(buffer):
            assert event.error_code == og.EngineErrorCode.NONE
            if event.token is not None:
                found[next(i for i, request in enumerate(requests) if request is event.request)].append(event.token)
    for ids, tokens in zip(prompts(bundle), found, strict=True):
        assert tokens == every.finish(every.start(ids, tokens=6), ids)


def test_onnx_runtime_itself_activates_the_adapter_files(every_logit: Path, bundle: Bundle) -> None:
    session = ort.InferenceSession(str(every_logit / "model.onnx"), providers=["CPUExecutionProvider"])
    ids, caches = prompts(bundle)[0], bundle.decoder("cpu")[1].past_names
    shape = session.get_inputs()[2].shape
    feeds = {name: np.zeros((1, shape[1], len(ids), shape[3]), np.float32) for name in caches}
    feeds |= {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}

    def logits(adapter: str) -> Any:
        options, loaded = ort.RunOptions(), ort.LoraAdapter()
        if adapter:
            loaded.Load(str(every_logit / "adapters" / f"{adapter}.onnx_adapter"))
            options.add_active_adapter(loaded)
        return session.run(["logits"], feeds, options)[0]

    assert np.array_equal(logits(""), logits("lora"))
    assert np.abs(logits("") - logits("none")).max() > 0.01


def test_the_cuda_form_computes_the_logits_of_its_decoder(og: Any, bundle: Bundle, tmp_path: Path) -> None:
    export = export_genai(bundle, tmp_path / "cuda")
    assert export.provider == "cuda"  # the bundle's device is a GPU
    settings = json.loads((export.directory / "genai_config.json").read_text())
    (provider,) = settings["model"]["decoder"]["session_options"]["provider_options"]
    assert provider["cuda"]["enable_cuda_graph"] == "0"
    model, decoder = Model(og, export.directory), CudaDecoder.of(bundle, RuntimeOptions(context=96), provider="cpu")
    decoder.set_lora(load_lora(bundle.path("lora.safetensors"), bundle.contract))
    for ids in prompts(bundle):
        generator = model.start(ids, "lora")
        assert np.abs(generator.get_output("logits")[0, 0] - decoder.prefill([ids])[0]).max() < 1e-4
        (expected,) = generate(decoder, [ids], max_tokens=TOKENS, stop=bundle.manifest["model"]["stop_tokens"])
        found = model.finish(generator, ids)
        assert without_end(found, bundle.manifest["model"]["stop_tokens"]) == list(expected.tokens)


def test_the_settings_are_those_of_the_model(exported: Path, every_logit: Path, tiny_llama: Path) -> None:
    config, settings = read_config(tiny_llama), json.loads((exported / "genai_config.json").read_text())
    decoder, model = settings["model"]["decoder"], settings["model"]
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"):
        assert decoder[name] == config[name]
    assert decoder["head_size"] == config["hidden_size"] // config["num_attention_heads"]
    assert (model["vocab_size"], model["context_length"]) == (config["vocab_size"], config["max_position_embeddings"])
    assert (model["eos_token_id"], model["pad_token_id"]) == ([256], 256)
    assert "bos_token_id" not in model  # the tokenizer has none
    assert settings["search"] == {"do_sample": False, "max_length": 96, "past_present_share_buffer": True}
    exact = json.loads((every_logit / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert (exact["session.disable_quant_qdq"], exact["session.qdq_matmulnbits_accuracy_level"]) == ("1", "0")
    assert decoder["session_options"]["session.qdq_matmulnbits_accuracy_level"] == "4"
    assert "session.disable_quant_qdq" not in decoder["session_options"]


def test_another_limit(og: Any, bundle: Bundle, tmp_path: Path) -> None:
    export = export_genai(bundle, tmp_path / "a", GenaiOptions(provider="cpu", max_length=40))
    model, ids = Model(og, export.directory), prompts(bundle)[0]
    generator = og.Generator(model.model, og.GeneratorParams(model.model))
    generator.append_tokens(ids)
    assert len(ids) + len(model.finish(generator, ids)) <= 40


def test_files_are_sealed_and_the_bundle_s_are_left_alone(tiny_bundle: Path, exported: Path) -> None:
    assert (exported / "weights.bin").read_bytes() == (tiny_bundle / "weights.bin").read_bytes()
    assert (tiny_bundle / "weights.bin").stat().st_nlink == 1  # onnx takes a second link for an attack
    onnx.checker.check_model(str(exported / "model.onnx"))
    checked = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=exported, check=False)
    assert checked.returncode == 0
    listed = {line[66:] for line in (exported / SUMS).read_text().splitlines()}
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert listed == files - {SUMS}
    assert {"tokenizer.json", "chat_template.jinja", "adapters/lora.onnx_adapter", "adapters/none.onnx_adapter"} < files


@pytest.mark.parametrize("name", ["weights.bin", "cpu.onnx", "lora.safetensors", "tokenizer/tokenizer.json"])
def test_an_altered_file_is_not_exported(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match="was altered"):
        export_genai(Bundle.open(copy), tmp_path / "out", GenaiOptions(provider="cpu"))
    assert not (tmp_path / "out").exists()


def test_outputs_and_names_that_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    def refusal(output: Path, options: GenaiOptions = GenaiOptions(), **more: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            export_genai(bundle, output, options, **more)
        return str(caught.value)

    config = bundle.config
    assert "lies inside the bundle" in refusal(bundle.directory / "genai")
    for name in ("lora", "none", "a/b", "..", ""):
        assert "an adapter cannot be called" in refusal(tmp_path / "x", adapters={name: config})
    line = refusal(tmp_path / "x", GenaiOptions(max_length=10**6))
    assert line == "max_length must be at most 8192, the positions of the bundle's graph, got 1000000"
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes").write_text("mine")
    assert "holds other files (notes)" in refusal(tmp_path / "used", overwrite=True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["model.onnx", "adapters/a.json", "weights.bin"])
def test_names_that_the_export_needs_itself(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (copy / "tokenizer" / name).parent.mkdir(exist_ok=True)
    (copy / "tokenizer" / name).write_text("{}")
    manifest = json.loads((copy / "manifest.json").read_text())
    seal(copy, {key: value for key, value in manifest.items() if key not in ("seal", "format", "coatrt", "files")})
    with pytest.raises(BundleError, match=f"has a file called {name.split('/')[0]}, which an export cannot hold"):
        export_genai(Bundle.open(copy), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_is_replaced_only_whole_and_when_asked(bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "model"
    export_genai(bundle, output, GenaiOptions(provider="cpu"))
    with pytest.raises(ConfigError, match="holds an export; give a new directory, or --overwrite"):
        export_genai(bundle, output)
    assert export_genai(bundle, output, overwrite=True).provider == "cuda"
    (output / "notes").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files \(notes\)"):
        export_genai(bundle, output, overwrite=True)
    assert (output / "notes").read_text() == "mine"


def test_a_bundle_without_that_graph(tiny_bundle: Path, tmp_path: Path, bundle: Bundle) -> None:
    manifest: Any = dict(bundle.manifest)
    decoders = {name: entry for name, entry in manifest["decoders"].items() if name != "cuda"}
    lacking = Bundle(tiny_bundle, {**manifest, "decoders": decoders})
    with pytest.raises(BundleError, match="has no cuda graph, only"):
        export_genai(lacking, tmp_path / "out")
