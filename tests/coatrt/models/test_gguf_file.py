"""GGUF files mean the model they were written from, or are refused by name."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coatrt.errors import CheckpointError
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.config_file import end_tokens
from coatrt.models.exportable import check_exportable
from coatrt.models.gguf_file import GgufModel
from coatrt.models.modules import load_model
from coatrt.models.spec import DecoderSpec
from support.families import LLAMA3, save_model
from support.gguf_files import write_gguf

pytest.importorskip("gguf", reason="needs the gguf extra")

_BIG = {"vocab_size": 272, "max_position_embeddings": 256, "eos_token_id": 256}
_LLAMA3 = {**LLAMA3, "original_max_position_embeddings": 32}


def _model(tmp_path: Path, name: str = "llama", **changes: Any) -> Any:
    return save_model(tmp_path / "source", name, **{**_BIG, **changes})


def _rope_freqs(model: Any) -> Any:
    """Return what llama.cpp's converter writes for llama3's scaling: plain frequencies over the scaled."""
    width, base = model.config.head_dim, model.config.rope_parameters["rope_theta"]
    plain = 1.0 / base ** (np.arange(0, width, 2) / width)
    return (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)


def _same(path: Path, model: Any) -> None:
    checkpoint = Checkpoint.open(path)
    check_exportable(checkpoint, DecoderSpec.from_config(checkpoint.config))
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (1, 60)))
    with torch.no_grad():
        expected, found = model(ids).logits, load_model(checkpoint)(ids).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["llama", "llama-llama3-head_dim", "qwen2", "qwen3", "tied", "half"])
def test_a_family_is_the_model_it_was_written_from(name: str, tmp_path: Path) -> None:
    model = _model(
        tmp_path,
        {"tied": "llama", "half": "llama"}.get(name, name),
        **({"tie_word_embeddings": True} if name == "tied" else {}),
    )
    scaled = {"rope_freqs.weight": _rope_freqs(model)} if "llama3" in name else None
    arch = model.config.model_type
    _same(write_gguf(tmp_path / "m.gguf", model, arch, more=scaled, half=name == "half"), model)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_a_gemma3_is_the_model_it_was_written_from(factor: float, tmp_path: Path) -> None:
    full = {"rope_type": "linear", "rope_theta": 5e5, "factor": factor}
    ropes = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    shape = {"num_hidden_layers": 6, "layer_types": None, "query_pre_attn_scalar": 16, "sliding_window": 9}
    model = _model(tmp_path, "gemma3_text", rope_parameters=ropes, **shape)
    assert model.config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    keys: list[tuple[str, str, Any]] = [("add_uint32", "gemma3.attention.sliding_window", 9)]
    if factor > 1:
        keys += [
            ("add_string", "gemma3.rope.scaling.type", "linear"),
            ("add_float32", "gemma3.rope.scaling.factor", factor),
        ]
    _same(write_gguf(tmp_path / "m.gguf", model, "gemma3", keys=keys), model)


def test_another_architecture_is_refused_by_the_first_kilobyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", _model(tmp_path), "phi3")
    (tmp_path / "m.gguf").write_bytes(whole.read_bytes()[:1024])
    monkeypatch.setitem(sys.modules, "gguf", None)  # not even the package is needed
    with pytest.raises(
        CheckpointError, match=r"m.gguf has the architecture phi3; allowed: gemma3, llama, qwen2"
    ) as caught:
        Checkpoint.open(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"factor": 32.0}, {"original_max_position_embeddings": 64}])
def test_llama3_scaling_is_read_from_its_factors(changes: dict[str, float], tmp_path: Path) -> None:
    model = _model(tmp_path, rope_parameters={**_LLAMA3, **changes})
    _same(write_gguf(tmp_path / "m.gguf", model, more={"rope_freqs.weight": _rope_freqs(model)}), model)


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "linear"), ("qwen2", "linear"), ("llama", "yarn"), ("qwen2", "yarn")]
)
def test_scaling_by_keys_is_honoured(name: str, kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    keys: list[tuple[str, str, Any]] = [
        ("add_string", f"{name}.rope.scaling.type", kind),
        ("add_float32", f"{name}.rope.scaling.factor", 4.0),
    ]
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 32
        keys.append(("add_uint32", f"{name}.rope.scaling.original_context_length", 32))
    model = _model(tmp_path, name, rope_parameters=rope)
    _same(write_gguf(tmp_path / "m.gguf", model, name, keys=keys), model)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (("add_string", "llama.rope.scaling.type", "longrope"), "has rope scaling 'longrope'"),
        (("add_string", "llama.rope.scaling.type", "yarn"), "lacks the key llama.rope.scaling.factor"),
        (("add_float32", "llama.rope.scaling.attn_factor", 1.5), "the keys llama.rope.scaling.attn_factor"),
        (("add_float32", "llama.rope.scale_linear", 2.0), "llama.rope.scale_linear"),
        (("add_uint32", "llama.attention.sliding_window", 8), "llama.attention.sliding_window"),
        (("add_float32", "llama.logit_scale", 2.0), "llama.logit_scale"),
        (("add_float32", "llama.attention.scale", 0.1), "llama.attention.scale"),
        (("add_uint32", "llama.expert_count", 8), "llama.expert_count"),
        (("add_uint32", "llama.rope.dimension_count", 8), "heads of width 16 and rope.dimension_count 8"),
        (("add_uint32", "llama.attention.value_length", 8), "attention.value_length 8"),
        (("add_uint16", "split.count", 2), "is one of 2 parts; merge them"),
        (("add_string", "general.type", "adapter"), "has the architecture llama"),
        (("add_string", "clip.vision.model", "x"), "clip.vision.model"),
    ],
)
def test_what_no_config_stands_for_is_refused_by_name(key: tuple[str, str, Any], said: str, tmp_path: Path) -> None:
    model = _model(tmp_path)
    path = write_gguf(tmp_path / "m.gguf", model, keys=[key])
    with pytest.raises(CheckpointError, match=said) as caught:
        GgufModel(path)
    assert "\n" not in str(caught.value)


def test_tensors_are_compared_both_ways(tmp_path: Path) -> None:
    model = _model(tmp_path)
    ones = np.ones(64, np.float32)
    for name in ("blk.0.attn_output_norm.weight", "blk.3.attn_norm.weight", "rope_factors_long.weight", "cls.weight"):
        with pytest.raises(CheckpointError, match=f"1 tensors .* like {name}"):
            GgufModel(write_gguf(tmp_path / "m.gguf", model, more={name: ones}))
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight that is not llama3's"):
        GgufModel(
            write_gguf(tmp_path / "m.gguf", model, more={"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)})
        )
    path = write_gguf(tmp_path / "q.gguf", model, more={"blk.0.attn_q.bias": ones})
    checkpoint = Checkpoint.open(path)
    with pytest.raises(CheckpointError, match=r"unused for its family .*, like model.layers.0.self_attn.q_proj.bias"):
        check_exportable(checkpoint, DecoderSpec.from_config(checkpoint.config))
    lost = {
        "model.layers.1.mlp.up_proj.weight": "blk.1.ffn_up.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.2.input_layernorm.weight": "blk.2.attn_norm.weight",
    }
    for name, stored in lost.items():
        with pytest.raises(CheckpointError, match=f"lacks the tensor {stored}"):
            GgufModel(write_gguf(tmp_path / "lost.gguf", model, without=[name]))


def test_every_end_token_is_kept(tmp_path: Path) -> None:
    keys = [("add_uint32", "tokenizer.ggml.eot_token_id", 257), ("add_uint32", "tokenizer.ggml.eom_token_id", 258)]
    checkpoint = Checkpoint.open(write_gguf(tmp_path / "m.gguf", _model(tmp_path), keys=keys))
    assert end_tokens(checkpoint.directory, checkpoint.config) == {256, 257, 258}


def test_a_damaged_header_is_one_line_at_once(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", _model(tmp_path)).read_bytes()
    rng, path = np.random.default_rng(0), tmp_path / "damaged.gguf"
    end = whole.index(b"token_embd.weight")
    for cut in rng.integers(0, end, 20):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="cannot be read as GGUF") as caught:
            GgufModel(path)
        assert "\n" not in str(caught.value)
    for at in [*range(24), *rng.integers(24, end, 200)]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            GgufModel(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
