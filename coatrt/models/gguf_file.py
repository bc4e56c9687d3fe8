"""GGUF files: every key and tensor is used, known not to affect the computation, or refused by name."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coatrt.errors import CheckpointError, reason
from coatrt.models.families import FAMILIES
from coatrt.models.gguf_header import architecture, check_header
from coatrt.system.extras import require

__all__ = ["GgufModel"]

_SILENT = re.compile(r"GGUF\.|general\.|tokenizer\.|quantize\.")
"""Keys that do not affect the computation; transformers reads those of the tokenizer."""
_PLAIN = {  # GGUF key after the architecture's name → key of config.json
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_FAMILIES = {"gemma3": "gemma3_text", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Architecture in a GGUF file → model_type."""
_GEMMA3_27B = 62  # layers of the one Gemma 3 whose queries are scaled by another width than that of a head


class GgufModel:
    """An open GGUF file of a Llama-like model.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is damaged, a part of a split file, of another family, or has keys or tensors that a
            config.json of its family cannot express.
        ExtraError: a package that reads them is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if (name := architecture(path)) and name not in _FAMILIES:
            raise self._error(f"has the architecture {name}; allowed: {', '.join(_FAMILIES)}; give safetensors")
        require(path.name, "gguf")
        import gguf

        try:
            check_header(path)
            reader = gguf.GGUFReader(path)
            self._keys: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the reader raises many kinds
            raise self._error(f"cannot be read as GGUF ({reason(error)}); download it again") from None
        self._tensors = {str(tensor.name): tensor for tensor in reader.tensors}
        if len(self._tensors) != len(reader.tensors):
            raise self._error("names a tensor twice; download it again")
        self._arch = str(self._keys.get("general.architecture"))
        kind = self._keys.get("general.type", "model")
        if self._arch not in _FAMILIES or kind != "model":
            raise self._error(
                f"has the architecture {self._arch} and the type {kind}; allowed: {', '.join(_FAMILIES)}, and the type "
                "model; give safetensors"
            )
        self.family = _FAMILIES[self._arch]
        if int(self._keys.get("split.count", 1)) > 1:
            raise self._error(f"is one of {self._keys['split.count']} parts; merge them (llama-gguf-split --merge)")
        self.config = self._read_config()
        self._names = self._read_names(gguf)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (Hugging Face name, tensor): float16 if stored as float16, else float32."""
        import gguf

        for name, stored in self._names.items():
            tensor = self._tensors[stored]
            half = tensor.tensor_type == gguf.GGMLQuantizationType.F16
            try:
                values = tensor.data if half else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as error:
                raise self._error(f"holds {stored} in a type that gguf cannot decode ({error})") from None
            rows = np.array(values).reshape([int(size) for size in reversed(tensor.shape)])
            heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
            if (
                self.family == "llama" and heads is not None
            ):  # llama.cpp rotates neighbouring dimensions, so its rows are interleaved
                count = self.config[heads]
                rows = rows.reshape(count, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
            if rows.ndim == 1 and name.endswith("norm.weight"):
                rows = rows - np.float32(FAMILIES[self.family].norm_offset)  # llama.cpp adds it
            yield name, torch.from_numpy(np.ascontiguousarray(rows))

    @property
    def end_tokens(self) -> list[int]:
        """Every token that ends a text or a turn."""
        candidates = [self._keys.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
        return sorted({int(token) for token in candidates if token is not None})

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}")

    def _read_config(self) -> dict[str, Any]:
        """Return the config.json that the keys describe."""
        remaining = {key: value for key, value in self._keys.items() if not _SILENT.match(key)}
        for key in ("split.count", "split.no", "split.tensors.count", f"{self._arch}.rope.scaling.finetuned"):
            remaining.pop(key, None)

        def take(name: str, default: Any = None) -> Any:
            value = remaining.pop(f"{self._arch}.{name}", default)
            if value is None:
                raise self._error(f"lacks the key {self._arch}.{name}; download it again or give safetensors")
            return value

        config = {theirs: take(ours) for ours, theirs in _PLAIN.items() if ours != "attention.head_count_kv"}
        config["num_key_value_heads"] = take("attention.head_count_kv", config["num_attention_heads"])
        counts = [value for key, value in config.items() if key != "rms_norm_eps"]
        if not all(isinstance(value, int) and value > 0 for value in counts):
            raise self._error(
                f"has {config}; each must be a whole number above 0, the same for all layers; give safetensors"
            )
        width = config["hidden_size"] // config["num_attention_heads"]
        head = take("attention.key_length", width)
        for name in ("attention.value_length", "rope.dimension_count"):
            if (other := take(name, head)) != head:
                raise self._error(f"has heads of width {head} and {name} {other}; they must be equal; give safetensors")
        base = float(take("rope.freq_base", 1e4))
        vocabulary = len(self._keys.get("tokenizer.ggml.tokens", ())) or None
        end, rope = self._keys.get("tokenizer.ggml.eos_token_id"), {"rope_type": "default", "rope_theta": base}
        kind = take("rope.scaling.type", "none")
        if kind in ("linear", "yarn"):
            rope |= {"rope_type": kind, "factor": float(take("rope.scaling.factor"))}
            if kind == "yarn":
                rope["original_max_position_embeddings"] = int(take("rope.scaling.original_context_length"))
        elif kind != "none":
            raise self._error(f"has rope scaling {kind!r}; allowed: none, linear, yarn; give safetensors")
        if "rope_freqs.weight" in self._tensors:
            if kind != "none":
                raise self._error(
                    "scales its rotary positions twice (rope.scaling.type and rope_freqs.weight); give safetensors"
                )
            rope |= self._llama3(base, int(head))
        config |= {
            "model_type": self.family,
            "head_dim": head,
            "vocab_size": int(take("vocab_size", vocabulary)),
            "rope_parameters": rope,
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": self._keys.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": end,
            "sliding_window": None,
        }
        if self.family == "gemma3_text":
            config |= self._gemma3(take, int(head), rope)
        if remaining:
            raise self._error(
                f"has the keys {', '.join(sorted(remaining)[:3])}, which config.json cannot express; give safetensors"
            )
        return config

    def _gemma3(self, take: Callable[..., Any], head: int, rope: dict[str, Any]) -> dict[str, Any]:
        """Return what a Gemma 3 adds; llama.cpp knows the rest by the number of layers (`llama-model.cpp`)."""
        pattern = 6  # every sixth layer sees the whole context
        hidden, heads = int(self._keys["gemma3.embedding_length"]), int(self._keys["gemma3.attention.head_count"])
        layers = int(self._keys["gemma3.block_count"])
        kinds = ["full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)]
        local = {"rope_type": "default", "rope_theta": float(take("rope.freq_base_swa", 1e4))}
        return {
            "layer_types": kinds,
            "sliding_window": int(take("attention.sliding_window")),
            "rope_parameters": {"full_attention": rope, "sliding_attention": local},
            "query_pre_attn_scalar": hidden // heads if layers == _GEMMA3_27B else head,
            "final_logit_softcapping": take("final_logit_softcapping", 0.0) or None,
        }

    def _llama3(self, base: float, width: int) -> dict[str, Any]:
        """Return the llama3 rope scaling of `rope_freqs.weight`, which has its factors on the wavelengths.

        Formula: transformers, `modeling_rope_utils._compute_llama3_parameters`. The low and high factors are those of
        Llama 3 (1 and 4), the factor is the largest of the tensor, and one in between gives the original length.
        """
        factors = np.asarray(self._tensors["rope_freqs.weight"].data, np.float64).reshape(-1)
        wavelengths = 2 * math.pi * base ** (np.arange(0, width, 2) / width)
        low, high, most = 1.0, 4.0, float(factors.max())
        if most == 1.0 and (factors == 1.0).all():
            return {}
        between = np.flatnonzero((factors > 1.001) & (factors < 0.999 * most))
        original = 8192.0
        if len(between) and factors.shape == wavelengths.shape:
            i = int(between[0])
            smooth = (1 / factors[i] - 1 / most) / (1 - 1 / most)
            original = round(wavelengths[i] * (low + smooth * (high - low)))
        smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        model_factors = 1 / ((1 - smooth) / most + smooth)
        if factors.shape != model_factors.shape or not np.allclose(model_factors, factors, rtol=1e-4):
            raise self._error("has a rope_freqs.weight that is not llama3's; give safetensors")
        return {
            "rope_type": "llama3",
            "factor": most,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": int(original),
        }

    def _read_names(self, gguf: Any) -> dict[str, str]:
        """Return Hugging Face name → stored name of every tensor; any other tensor is refused."""
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self._arch)
        layers = self.config["num_hidden_layers"]
        if layers > len(self._tensors):
            raise self._error(f"has {len(self._tensors)} tensors for {layers} layers; download it again")
        table = gguf.get_tensor_name_map(arch, layers)
        modules = ["model.embed_tokens", "model.norm", "lm_head"]
        parts = [norm for norm in FAMILIES[self.family].norms if norm]
        parts += [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
        parts += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        modules += [f"model.layers.{layer}.{part}" for layer in range(layers) for part in parts]
        optional = {"lm_head"} if self.family in ("gemma3_text", "qwen3") else {"lm_head", "q_norm", "k_norm"}
        names = {}
        for module in modules:
            stored = table.get_name(module)
            if f"{stored}.weight" not in self._tensors and module.rsplit(".", 1)[-1] not in optional:
                raise self._error(f"lacks the tensor {stored}.weight; download it again or give safetensors")
            for kind in ("weight", "bias"):
                if stored is not None and f"{stored}.{kind}" in self._tensors:
                    names[f"{module}.{kind}"] = f"{stored}.{kind}"
        strays = sorted(set(self._tensors) - set(names.values()) - {"rope_freqs.weight"})
        if strays:
            raise self._error(
                f"has {len(strays)} tensors that the family {self._arch} does not use, like {', '.join(strays[:3])}; "
                "give the model's safetensors"
            )
        return names
