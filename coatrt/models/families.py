"""The table of model families: what each differs in from Llama; a new one is an entry here and a tiny test model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

__all__ = ["FAMILIES", "LEFT_OUT", "Family"]

Power = tuple[str, float]
"""A factor: a key of config.json and the power to which its value is raised."""

_NONE = ("", 0.0)
_LLAMA_NORMS = ("input_layernorm", "", "post_attention_layernorm", "")
_AFTER = ("", "post_attention_layernorm", "", "post_feedforward_layernorm")
_GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_PARALLEL_NORMS = ("input_layernorm", "", "", "")


@dataclass(frozen=True)
class Family:
    """What a family differs in; the defaults are Llama's.

    Rotary frequencies are not here: they are read from transformers' own module, whatever the family.

    Args:
        layer_norm: whether norms also subtract the mean and add a bias, if they have one.
        epsilon: key of the norms' epsilon.
        norm_offset: added to every norm weight (Gemma stores weight − 1).
        norms: names of a layer's norms before and after attention, before and after the MLP; "" for none. A norm
            whose tensor a checkpoint lacks is passed over.
        last_norm: name of the norm before the head.
        parallel: whether attention and MLP read the same input; "key" of config.json if that varies.
        head_norms: names of the norms of queries and keys, which a checkpoint may lack.
        head_norms_last: whether they follow the rotation.
        interleaved: whether the rotation pairs neighbouring dimensions instead of those half a head apart.
        windows: which layers honour `sliding_window`: none, all, or those of `layer_types`.
        rotary: which layers rotate: all; those of `no_rope_layers`; those with a window; or those with a window, and
            all of a model without `sliding_window`.
        head_dim: whether the modules read `head_dim`.
        activation: key of the activation's name.
        gated: whether the MLP multiplies by a gate.
        modules: names of matrices that differ: ours → the family's.
        embedding: factor on the embeddings.
        residual: factor on the output of attention and MLP.
        attention: factor on query · key; by default one over the root of the head's width.
        logits: divisor of the logits.
        attention_cap: key of the soft cap of query · key.
        logits_cap: key of the soft cap of the logits.
        refused: key → what it means; a checkpoint where it is set is refused.
    """

    layer_norm: bool = False
    epsilon: str = "rms_norm_eps"
    norm_offset: float = 0.0
    norms: tuple[str, str, str, str] = _LLAMA_NORMS
    last_norm: str = "model.norm"
    parallel: bool | str = False
    head_norms: tuple[str, str] = ("q_norm", "k_norm")
    head_norms_last: bool = False
    interleaved: bool = False
    windows: Literal["none", "all", "layer_types"] = "none"
    rotary: Literal["all", "no_rope_layers", "windowed", "windowed or all"] = "all"
    head_dim: bool = True
    activation: str = "hidden_act"
    gated: bool = True
    modules: Mapping[str, str] = field(default_factory=dict)
    embedding: Power = _NONE
    residual: Power = _NONE
    attention: Power = _NONE
    logits: Power = _NONE
    attention_cap: str = ""
    logits_cap: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)


_LLAMA = Family()
_GEMMA2 = Family(
    norm_offset=1.0,
    norms=_GEMMA_NORMS,
    windows="layer_types",
    activation="hidden_activation",
    embedding=("hidden_size", 0.5),
    attention=("query_pre_attn_scalar", -0.5),
    attention_cap="attn_logit_softcapping",
    logits_cap="final_logit_softcapping",
)
_COHERE = Family(
    layer_norm=True,
    epsilon="layer_norm_eps",
    norms=_PARALLEL_NORMS,
    parallel=True,
    interleaved=True,
    logits=("logit_scale", -1.0),
)
_MULTIPLIERS = Family(
    embedding=("embedding_multiplier", 1.0),
    residual=("residual_multiplier", 1.0),
    attention=("attention_multiplier", 1.0),
    logits=("logits_scaling", 1.0),
)
_SQUARED = Family(gated=False)

FAMILIES: Mapping[str, Family] = {
    "apertus": Family(norms=("attention_layernorm", "", "feedforward_layernorm", ""), gated=False),
    "arcee": _SQUARED,
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, windows="layer_types", rotary="windowed"),
    "cwm": Family(windows="layer_types"),
    "ernie4_5": Family(interleaved=True),
    "exaone4": Family(norms=_AFTER, windows="layer_types", rotary="windowed or all"),
    "gemma": Family(norm_offset=1.0, embedding=("hidden_size", 0.5)),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, attention_cap=""),  # its modules do not read attn_logit_softcapping
    "glm": Family(interleaved=True),
    "glm4": Family(
        interleaved=True,
        norms=("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    ),
    "granite": _MULTIPLIERS,
    "helium": Family(interleaved=True),
    "hunyuan_v1_dense": Family(head_norms=("query_layernorm", "key_layernorm"), head_norms_last=True),
    "hyperclovax": replace(
        _MULTIPLIERS,
        norms=("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2"),
        logits=("logits_scaling", -1.0),
    ),
    "internlm3": _LLAMA,
    "iquestcoder": _LLAMA,
    "jais2": replace(_SQUARED, layer_norm=True, epsilon="layer_norm_eps"),
    "llama": _LLAMA,
    "ministral": Family(windows="layer_types"),
    "mistral": Family(windows="all"),
    "nemotron": replace(_SQUARED, layer_norm=True, epsilon="norm_eps", norm_offset=1.0),
    "olmo2": Family(norms=_AFTER),
    "olmo3": Family(norms=_AFTER, windows="layer_types"),
    "phi": Family(
        layer_norm=True,
        epsilon="layer_norm_eps",
        norms=_PARALLEL_NORMS,
        last_norm="model.final_layernorm",
        parallel=True,
        head_norms=("q_layernorm", "k_layernorm"),
        gated=False,
        modules={"o_proj": "dense", "up_proj": "fc1", "down_proj": "fc2"},
    ),
    "phi3": Family(windows="all"),
    "qwen2": Family(windows="layer_types"),
    "qwen3": Family(windows="layer_types"),
    "seed_oss": _LLAMA,
    "smollm3": Family(windows="layer_types", rotary="no_rope_layers"),
    "stablelm": Family(
        layer_norm=True,
        epsilon="layer_norm_eps",
        parallel="use_parallel_residual",
        head_dim=False,
        refused={"qk_layernorm": "norms of single heads"},
    ),
    "starcoder2": Family(
        layer_norm=True,
        epsilon="norm_epsilon",
        windows="all",
        gated=False,
        modules={"up_proj": "c_fc", "down_proj": "c_proj"},
    ),
    "vaultgemma": replace(_GEMMA2, norms=("input_layernorm", "", "pre_feedforward_layernorm", "")),
}
"""Values of model_type that the graph writer knows, each tested against transformers."""

_REASONS = {
    "a mixture of experts": (
        "afmoe aria_text axk1 axk2 beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots1 "
        "dots3_note dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss "
        "granitemoe granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 jetmoe kolibri1 laguna llama4 "
        "llama4_text longcat_flash mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text mixtral olmoe phimoe qwen2_moe "
        "qwen3_moe sarvam_mla sarvam_moe solar_open"
    ),
    "layers with a recurrent state": (
        "bailing_hybrid bamba dory falcon_h1 falcon_mamba granitemoehybrid hrm_text inkling2_loop_text inkling2_text "
        "inkling_text jamba kimi_linear lara_mini lfm2 lfm2_moe lfm3 mamba mamba2 minimax nemotron_h olmo_hybrid "
        "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma rwkv "
        "xlstm zamba zamba2 zaya"
    ),
    "latent attention, whose caches hold no keys": "minicpm3 youtu",
    "positions that are learned or biases of the attention": (
        "biogpt bloom codegen cpmant ctrl gpt-sw3 gpt2 gpt_bigcode gpt_neo gptj mpt openai-gpt opt xglm"
    ),
    "a layout of its own: q, k and v interleaved by head in one matrix": (
        "falcon gpt_neox gpt_neox_japanese persimmon"
    ),
    "attention or layers of its own": (
        "apertus1p5_text bitnet blt cohere_compass_text diffllama doge exaone gemma3n gemma3n_text gemma4 gemma4_text "
        "gemma4_unified gemma4_unified_text granite_swa ministral3 modernbert-decoder nanochat olmo phi4_multimodal"
    ),
    "more than text; save its language model alone": (
        "emu3 fuyu gemma3 gemma4_assistant gemma4_unified_assistant git got_ocr2 mistral3 mllama moshi "
        "moss_transcribe_diarize musicgen musicgen_melody trocr whisper"
    ),
    "an encoder or its decoder": (
        "bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text "
        "electra ernie marian mbart megatron-bert mvp pegasus plbart prophetnet reformer rembert roberta "
        "roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod"
    ),
}
LEFT_OUT: Mapping[str, str] = {name: reason for reason, names in _REASONS.items() for name in names.split()}
"""Values of model_type that are refused, and what in them cannot be exported."""
