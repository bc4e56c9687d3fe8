"""Writes models as GGUF files, in the layout of llama.cpp's converter."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


_GEMMA3 = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def _name(name: str, arch: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    parts = _PARTS | _GEMMA3 if arch == "gemma3" else _PARTS
    return f"blk.{layer}.{parts[part]}.{kind}"


def _interleave(rows: Any, heads: int) -> Any:
    """Return rows [N, …] in llama.cpp's order for rotary embedding: the two halves of each head interleaved."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    model: Any,
    arch: str = "llama",
    *,
    keys: Sequence[tuple[str, str, Any]] = (),
    more: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
    edit: Callable[[Any], None] | None = None,
    half: bool = False,
) -> Path:
    """Write a model with a byte tokenizer.

    Args:
        path: the file.
        model: a model of transformers.
        arch: llama.cpp's name of the family.
        keys: (method of GGUFWriter, key, value) to add.
        more: tensors to add, by their names in the file.
        without: Hugging Face names of tensors to leave out.
        edit: called with the writer before the keys.
        half: matrices in float16.
    """
    import gguf
    from tokenizers import pre_tokenizers

    config = model.config
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for method, key, value in keys:
        getattr(writer, method)(key, value)
    if edit is not None:
        edit(writer)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>", "th"]
    tokens += [f"<t{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 1] + [3] * (len(tokens) - 258))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(256)
    for name, parameter in model.state_dict().items():
        if name in without or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values = parameter.detach().float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if arch == "llama" and heads is not None:
            values = _interleave(values, heads)
        if arch == "gemma3" and name.endswith("norm.weight"):
            values = values + np.float32(1)
        writer.add_tensor(
            _name(name, arch), np.ascontiguousarray(values.astype(np.float16) if half and values.ndim == 2 else values)
        )
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
