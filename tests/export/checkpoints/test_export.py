"""Checkpoints for other runtimes, read back by the packages of those runtimes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import coatrt
from coatrt.adapter.adapter import Adapter
from coatrt.configs.config import ConfigPatterns, QuantConfig
from coatrt.errors import CheckpointError, ConfigError
from coatrt.export.checkpoints.export import export_checkpoint
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.codec import decode

MIX = {
    "default": "int4-g32",
    "patterns": {"*.v_proj": "fp8", "*.o_proj": "nvfp4", "*0.mlp.gate_proj": "nf3-g32", "*.down_proj": "int8"},
}


@pytest.fixture(scope="module")
def adapter(tiny_adapter: Path) -> Adapter:
    loaded = Adapter.from_pretrained(tiny_adapter)
    generator = torch.Generator().manual_seed(0)
    for B in loaded.lora.B:  # a LoRA of visible effect
        B.data.add_(torch.randn(B.shape, generator=generator) * 0.05)
    return loaded


@pytest.fixture(scope="module")
def config(adapter: Adapter) -> QuantConfig:
    return ConfigPatterns.from_json(MIX).resolve(adapter.description.model)


def decoded(adapter: Adapter, config: QuantConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the weights of a configuration as coatrt decodes them."""
    codes = adapter.codes(adapter.checkpoint())
    return {name: decode(codes.get(name, fmt), dtype) for name, fmt in config.formats.items()}


def test_compressed_tensors_decompresses_to_our_weights(adapter: Adapter, config: QuantConfig, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (pip install compressed-tensors)")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = export_checkpoint(adapter, config, tmp_path / "out")
    assert result.line == (
        "stored in 16 bits: model.embed_tokens (embedding and head stay in 16 bits); "
        "model.layers.0.mlp.gate_proj (compressed-tensors has no NormalFloat)"
    )
    model = AutoModelForCausalLM.from_pretrained(result.model, dtype="auto")
    ids = torch.arange(24)[None]
    model.hf_quantizer.compressor.decompress_model(model)
    state = model.state_dict()
    for name, weight in decoded(adapter, config, torch.float16).items():
        assert torch.equal(state[f"{name}.weight"].half(), weight), name
    stored = load_file(result.model / "model-00001.safetensors")
    assert stored["model.layers.1.self_attn.q_proj.weight_packed"].dtype == torch.int32
    assert stored["model.layers.0.self_attn.o_proj.weight_packed"].dtype == torch.uint8
    peft = PeftModel.from_pretrained(model.to(torch.float32), result.lora).eval()
    with torch.no_grad():
        theirs = peft(ids).logits
    assert torch.allclose(theirs, logits(adapter, config, ids), atol=1e-4 * float(theirs.abs().max()))
    assert not torch.allclose(theirs, logits(adapter, config, ids, lora=False), atol=1e-2 * float(theirs.abs().max()))


def logits(adapter: Adapter, config: QuantConfig, ids: torch.Tensor, lora: bool = True) -> torch.Tensor:
    """Return our logits with the weights in float16 and the LoRA in float32."""
    from coatrt.evaluation.fake_quant import FakeQuantModel

    checkpoint = adapter.checkpoint()
    model = FakeQuantModel(checkpoint, adapter.codes(checkpoint))
    model.set_weights((name, weight.float()) for name, weight in decoded(adapter, config, torch.float16).items())
    model.set_lora(adapter.description.contract, adapter.emit(config) if lora else None)
    with torch.no_grad():
        return model.logits(ids)


def test_a_checkpoint_that_was_exported_is_read_with_its_codes(
    adapter: Adapter, config: QuantConfig, tmp_path: Path
) -> None:
    """What is written is read: the same codes in the same formats."""
    result = export_checkpoint(adapter, config, tmp_path / "out")
    again, codes = Checkpoint.open(result.model), adapter.codes(adapter.checkpoint())
    assert again.codes is not None
    from coatrt.quantization.code_cache import CodeStore

    store, same = CodeStore(again), 0
    for name, fmt in again.codes.formats.items():
        ours, theirs = codes.get(name, config[name]), store.get(name, fmt)
        assert fmt == str(ours.format), name
        assert torch.equal(ours.codes.float(), theirs.codes.float()), name
        assert torch.equal(ours.scales.float(), theirs.scales.float()), name  # type: ignore[union-attr]
        assert ours.constant == theirs.constant
        same += 1
    assert same == 13  # of 15: not the table, not NormalFloat


def test_gguf_holds_our_weights_and_lora(adapter: Adapter, config: QuantConfig, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the gguf extra")
    from coatrt.models.gguf_file import GgufModel

    result = export_checkpoint(adapter, config, tmp_path / "out", "gguf")
    assert result.line is not None
    assert "model.layers.0.mlp.gate_proj (GGUF has no type for nf3-g32)" in result.line
    read = dict(GgufModel(result.model).tensors())
    exact, half = decoded(adapter, config, torch.float32), decoded(adapter, config, torch.float16)
    for name, weight in exact.items():
        held = config[name].kind in ("int4", "int8")
        assert torch.equal(read[f"{name}.weight"].float(), weight if held else half[name].float()), name
    checkpoint = adapter.checkpoint()
    for name in set(checkpoint.tensors) - {f"{name}.weight" for name in exact}:
        assert torch.equal(read[name], checkpoint.tensor(name).float()), name
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(result.model).tensors}
    assert types["token_embd.weight"] == types["blk.0.attn_q.weight"] == "Q4_0"
    assert types["blk.1.ffn_down.weight"] == "Q8_0"
    config_read = GgufModel(result.model).config
    assert config_read["num_key_value_heads"] == 2
    assert config_read["tie_word_embeddings"] is True
    lora = gguf.GGUFReader(result.lora)
    assert lora.fields["adapter.lora.alpha"].contents() == adapter.description.contract.alpha
    tensors, emitted = {tensor.name: tensor.data for tensor in lora.tensors}, adapter.emit(config)
    for t in adapter.description.contract.tensors:
        layer, kind = t.matrix.split(".")[2], t.matrix.rsplit(".", 1)[-1]
        theirs = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}.get(kind)
        stem = f"blk.{layer}.{theirs or 'ffn_' + kind.removesuffix('_proj')}.weight"
        B = emitted[t.B].numpy().T / (adapter.description.contract.alpha / t.rank)
        if kind in ("q_proj", "k_proj"):  # two halves of a head interleaved
            heads = 4 if kind == "q_proj" else 2
            B = B.reshape(heads, 2, -1, t.rank).swapaxes(1, 2).reshape(B.shape)
        assert np.array_equal(tensors[f"{stem}.lora_a"], emitted[t.A].numpy().T)
        assert np.allclose(tensors[f"{stem}.lora_b"], B, rtol=1e-6)


def test_output_directories(adapter: Adapter, config: QuantConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_checkpoint(adapter, config, out)
    (out / "notes.md").write_text("mine")
    with pytest.raises(ConfigError, match="holds a checkpoint; give a new directory, or --overwrite"):
        export_checkpoint(adapter, config, out)
    export_checkpoint(adapter, config, out, overwrite=True)
    assert (out / "notes.md").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("")
    with pytest.raises(ConfigError, match="holds other files"):
        export_checkpoint(adapter, config, tmp_path / "other")
    with pytest.raises(ConfigError, match="format must be one of compressed-tensors, gguf, got 'exl3'"):
        export_checkpoint(adapter, config, tmp_path / "new", "exl3")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "granite"}, "is granite; GGUF is written of llama, mistral"),
        ({"hidden_act": "gelu"}, "another activation"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "wings": 2}}, "rotary positions with wings"),
    ],
)
def test_models_that_gguf_is_not_written_of(tiny_llama: Path, changes: dict[str, Any], message: str) -> None:
    from dataclasses import replace

    from coatrt.export.checkpoints.gguf import check_gguf

    checkpoint = Checkpoint.open(tiny_llama)
    with pytest.raises(CheckpointError, match=message):
        check_gguf(replace(checkpoint, config={**checkpoint.config, **changes}))


def test_the_front_door_names_it() -> None:
    assert coatrt.export_checkpoint is export_checkpoint
