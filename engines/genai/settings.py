"""genai_config.json: what onnxruntime-genai reads about a model, from a bundle's facts."""

from collections.abc import Sequence
from typing import Any

from coatrt.bundle import Bundle
from coatrt.configs.lora_contract import DecoderIO
from coatrt.engines.genai.graph import MASK
from coatrt.engines.genai.options import GenaiOptions, Provider
from coatrt.errors import ConfigError
from coatrt.models.matrices import EMBEDDING

__all__ = ["CONFIG", "MODEL", "genai_settings"]

CONFIG = "genai_config.json"
MODEL = "model.onnx"
_TYPE = "decoder"
"""onnxruntime-genai's type for any decoder-only language model. It serves families that it has no name for, and turns
off what it does for single families, such as another rotary table for long prompts of Phi-3: the graph does that."""

_CUDA = {
    "enable_cuda_graph": "0",
    "use_tf32": "0",
    "enable_skip_layer_norm_strict_mode": "1",  # otherwise squares are summed in float16
}


def genai_settings(
    bundle: Bundle, io: DecoderIO, provider: Provider, options: GenaiOptions, *, heads: int, tokenizer: str = ""
) -> dict[str, Any]:
    """Return the content of genai_config.json.

    Args:
        bundle: the bundle.
        io: inputs and outputs of the graph.
        provider: where the graph runs.
        options: see `GenaiOptions`.
        heads: query heads.
        tokenizer: directory of the tokenizer, relative to the configuration's; empty if it lies beside it.

    Raises:
        ConfigError: `max_length` exceeds the model's positions.
    """
    names = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    decoder = {
        "filename": MODEL,
        "head_size": io.head_dim,
        "hidden_size": bundle.model_matrices.by_name[EMBEDDING].K,
        "num_attention_heads": heads,
        "num_hidden_layers": io.layers,
        "num_key_value_heads": io.kv_heads,
        "session_options": _session(provider, options),
        "inputs": {"input_ids": "input_ids", "attention_mask": MASK, **names},
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model: dict[str, Any] = {"type": _TYPE, "context_length": io.max_positions, "vocab_size": io.vocabulary}
    if tokenizer:
        model["tokenizer_dir"] = tokenizer
    search = {
        "do_sample": False,
        "max_length": _max_length(bundle, io, options),
        "past_present_share_buffer": True,
    }
    return {"model": {**model, **_tokens(bundle), "decoder": decoder}, "search": search}


def _session(provider: Provider, options: GenaiOptions) -> dict[str, Any]:
    level = options.accuracy_level if provider == "cpu" else 0  # the CUDA provider has one level
    session: dict[str, Any] = {
        "log_id": "onnxruntime-genai",
        "provider_options": [{"cuda": _CUDA}] if provider == "cuda" else [],
        "session.qdq_matmulnbits_accuracy_level": str(level),
    }
    if provider == "cpu" and level == 0:  # decoded at load, as by `coatrt run`
        session["session.disable_quant_qdq"] = "1"
    return session


def _max_length(bundle: Bundle, io: DecoderIO, options: GenaiOptions) -> int:
    """Return the default limit on a sequence: a cache of all positions would take far more memory than most need."""
    if options.max_length is not None and options.max_length > io.max_positions:
        raise ConfigError(
            f"max_length must be at most {io.max_positions}, the positions of the bundle's graph, "
            f"got {options.max_length}"
        )
    engine = bundle.manifest["decoders"].get("engine")
    context = engine["io"].cache_length if engine is not None else None
    return options.max_length or min(context or io.max_positions, io.max_positions)


def _tokens(bundle: Bundle) -> dict[str, Any]:
    """Return end tokens, the tokenizer's own first, and the tokens of begin and padding, where there are any."""
    tokenizer = bundle.tokenizer()
    special = dict(tokenizer.special_tokens_map)
    stops = list(bundle.manifest["model"]["stop_tokens"])
    end = _id(tokenizer, special.get("eos_token"))
    ends = [*([end] if end in stops else []), *(stop for stop in stops if stop != end)]
    begin, padding = _id(tokenizer, special.get("bos_token")), _id(tokenizer, special.get("pad_token"))
    found: dict[str, Any] = {"eos_token_id": ends}
    if begin is not None:
        found["bos_token_id"] = begin
    found["pad_token_id"] = padding if padding is not None else (ends[0] if ends else 0)
    return found


def _id(tokenizer: Any, text: Any) -> int | None:
    """Return the id of a special token; None without one."""
    if not isinstance(text, str):
        return None
    rows: Sequence[Sequence[int]] = tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"]
    return int(rows[0][0]) if len(rows[0]) == 1 else None
