"""Tiny random models of every family, and a minimal runtime for their graphs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import DecoderIO, LoraContract
from coatrt.export.decoder import GraphForm, decoder_io, export_decoder
from coatrt.models.checkpoint import Checkpoint

CPU = GraphForm("cpu", "cpu.onnx", "float32")
ENGINE = GraphForm("engine", "base.onnx", "float32", 48)
CUDA = GraphForm("cuda", "cuda.onnx", "float16")

_BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
_HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 6,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.5 * i for i in range(6)],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-biases": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-multi-query": ("Llama", {"num_key_value_heads": 1}),
    "llama-one-head": ("Llama", {"num_attention_heads": 1, "num_key_value_heads": 1}),
    "llama-llama3-head_dim": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama-linear-gelu": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "hidden_act": "gelu"},
    ),
    "mistral-window": ("Mistral", {"sliding_window": 6, "rms_norm_eps": 0.3}),
    "mistral-full": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window-yarn": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "rope_parameters": _YARN},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3-window": ("SmolLM3", {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 4}),
    "granite": (
        "Granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.1, "logits_scaling": 2.5},
    ),
    "olmo2": ("Olmo2", {}),
    "gemma": ("Gemma", {"head_dim": 16, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": (
        "Gemma2",
        {
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 7,
            "sliding_window": 5,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3_text": (
        "Gemma3",
        {
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 7,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            },
        },
    ),
    "gemma3_text-capped": (
        "Gemma3",
        {
            "tie_word_embeddings": True,
            "sliding_window": 64,
            "final_logit_softcapping": 2.0,
            "attn_logit_softcapping": 3.0,
            "num_key_value_heads": 4,
        },
    ),
    "vaultgemma": ("VaultGemma", {"sliding_window": 5, "attn_logit_softcapping": 3.0, "tie_word_embeddings": True}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-longrope-window": (
        "Phi3",
        {
            "hidden_size": 64,
            "sliding_window": 6,
            "original_max_position_embeddings": 6,
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75},
            "tie_word_embeddings": True,
        },
    ),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": _YARN,
            },
        },
    ),
    "ministral": ("Ministral", {"sliding_window": 5, "layer_types": ["full_attention", *["sliding_attention"] * 2]}),
    "cwm": ("Cwm", {"bos_token_id": 1, "sliding_window": 5, "rope_parameters": LLAMA3}),
    "arcee": ("Arcee", {"hidden_act": "relu2", "mlp_bias": True}),
    "seed_oss": ("SeedOss", {"attention_bias": True, "attention_out_bias": True}),
    "helium": ("Helium", {"hidden_size": 64}),
    "ernie4_5": ("Ernie4_5", {"use_bias": True, "tie_word_embeddings": True}),
    "glm": (
        "Glm",
        {"hidden_size": 64, "attention_bias": True, "rope_parameters": _HALF | {"partial_rotary_factor": 1.0}},
    ),
    "glm4": ("Glm4", {"attention_bias": True, "rope_parameters": _HALF}),
    "cohere": ("Cohere", {"hidden_size": 64, "use_qk_norm": True, "logit_scale": 0.3, "tie_word_embeddings": True}),
    "cohere2": ("Cohere2", {"hidden_size": 64, "sliding_window": 5, "sliding_window_pattern": 2, "logit_scale": 0.25}),
    "exaone4": ("Exaone4", {"sliding_window": 5, "sliding_window_pattern": 2}),
    "exaone4-full": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "nemotron": ("Nemotron", {"hidden_act": "relu2", "rope_parameters": _HALF, "norm_eps": 1e-3}),
    "jais2": ("Jais2", {"hidden_act": "relu2", "attention_bias": True, "mlp_bias": True}),
    "hyperclovax": (
        "HyperCLOVAX",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.1,
            "logits_scaling": 0.4,
            "use_post_norm": True,
        },
    ),
    "hyperclovax-plain": ("HyperCLOVAX", {"use_post_norm": False}),
    "hunyuan_v1_dense": (
        "HunYuanDenseV1",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}},
    ),
    "apertus": ("Apertus", {"hidden_size": 64, "hidden_act": "xielu", "rope_parameters": LLAMA3}),
    "starcoder2": ("Starcoder2", {"hidden_act": "gelu_pytorch_tanh", "use_bias": True, "sliding_window": 6}),
    "phi": (
        "Phi",
        {
            "hidden_size": 64,
            "num_key_value_heads": 4,
            "hidden_act": "gelu_new",
            "qk_layernorm": True,
            "rope_parameters": _HALF,
        },
    ),
    "internlm3": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "iquestcoder": ("Llama", {}),
    "stablelm-parallel": (
        "StableLm",
        {"hidden_size": 64, "use_parallel_residual": True, "rope_parameters": _HALF},
    ),
    "stablelm": (
        "StableLm",
        {"hidden_size": 64, "use_qkv_bias": True, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
}


UNLIKE = (
    "llama-tied-biases", "llama-multi-query", "mistral-window", "qwen2-window-yarn", "qwen3", "smollm3-window",
    "granite", "gemma", "gemma2", "gemma3_text", "phi3-longrope-window", "olmo3", "cohere", "cohere2", "glm4",
    "hunyuan_v1_dense", "apertus", "starcoder2", "phi", "stablelm",
)  # fmt: skip
"""Models that between them have every difference; the others are tried in the slow tests too."""


def tiny_config(name: str, **overrides: Any) -> Any:
    """Return the configuration of a tiny model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(name.split("-")[0], **{**_BASE, **MODELS[name][1], **overrides})


def save_model(directory: Path, name: str, **overrides: Any) -> Any:
    """Save and return a random model: weights exact in fp16, norms and biases far from their defaults."""
    import transformers

    torch.manual_seed(len(name))
    model = getattr(transformers, f"{MODELS[name][0]}ForCausalLM")(tiny_config(name, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            parameter.copy_(parameter.half().float())
    model.save_pretrained(directory)
    return model


def export(
    checkpoint: Checkpoint,
    directory: Path,
    forms: Iterable[GraphForm] = (CPU,),
    fmt: str = "fp16",
    contract: LoraContract | None = None,
) -> Path:
    """Export every matrix in one format."""
    directory.mkdir(exist_ok=True)
    config = QuantConfig.uniform(checkpoint.matrices, fmt)
    export_decoder(checkpoint, config, directory, forms=tuple(forms), contract=contract)
    return directory


def join_lora(lora: dict[str, NDArray[Any]], inputs: set[str]) -> dict[str, NDArray[Any]]:
    """Return LoRA tensors with those of a fused group joined (A concatenated, B block-diagonal) as `inputs` require."""
    tensors_by_input = dict(lora)
    for joint, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
        joined = (name for name in inputs - set(lora) if name.startswith("lora_"))  # some models have one matrix
        for name in [name for name in joined if name.endswith(f".{joint}")]:
            tensors = [tensors_by_input.pop(name.removesuffix(joint) + part) for part in parts]
            tensors_by_input[name] = np.concatenate(tensors, axis=1)
            if name.startswith("lora_B."):
                ranks, widths = zip(*(tensor.shape for tensor in tensors), strict=True)
                blocks = tensors_by_input[name] = np.zeros((sum(ranks), sum(widths)), np.float32)
                for i, tensor in enumerate(tensors):
                    blocks[sum(ranks[:i]) : sum(ranks[: i + 1]), sum(widths[:i]) : sum(widths[: i + 1])] = tensor
    return tensors_by_input


class Runner:
    """Runs a decoder graph in ONNX Runtime and keeps its caches between steps."""

    def __init__(self, checkpoint: Checkpoint, directory: Path, form: GraphForm = CPU, slots: int = 48) -> None:
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        self.session = ort.InferenceSession(str(directory / form.file), options, providers=["CPUExecutionProvider"])
        self.io: DecoderIO = decoder_io(checkpoint, form)
        self.dtype = np.dtype(form.activations)
        self.slots = slots
        self.cache: dict[str, NDArray[Any]] = {}

    def start(self, batch: int) -> None:
        """Fill the caches with values that must not be read: NaN, or large numbers where the graph masks by adding."""
        shape = (batch, self.io.kv_heads, self.slots, self.io.head_dim)
        poison = 50 if self.io.cache_length else np.nan
        self.cache = {name: np.full(shape, poison, self.dtype) for name in self.io.past_names}

    def step(
        self, ids: NDArray[Any], starts: NDArray[Any], index: NDArray[Any], lora: dict[str, NDArray[Any]] | None = None
    ) -> NDArray[Any]:
        """Run ids [B, S] from positions `starts` [B]; return the logits [B, T, V] at `index` [B, T]."""
        ends = starts + ids.shape[1]
        values: dict[str, NDArray[Any]] = {
            "input_ids": ids,
            "position_ids": starts[:, None] + np.arange(ids.shape[1]),
            "write_index": starts,
            "logits_index": index,
            "logits_rows": index + ids.shape[1] * np.arange(len(ids))[:, None],
            "seqlens_k": (ends - 1).astype(np.int32),
            "total_sequence_length": np.array(ends.max(), np.int32),
        }
        names = {node.name for node in self.session.get_inputs()}
        inputs = {name: value for name, value in values.items() if name in names} | self.cache
        inputs |= {name: value.astype(self.dtype) for name, value in join_lora(lora or {}, names).items()}
        logits, *presents = self.session.run(["logits", *self.io.present_names], inputs)
        self.cache = dict(zip(self.io.past_names, presents, strict=True))
        return np.asarray(logits)

    def prefill_and_decode(
        self, prompts: list[NDArray[Any]], lengths: list[int], lora: dict[str, NDArray[Any]] | None = None
    ) -> list[NDArray[Any]]:
        """Return the logits [length, V] of each sequence: first `lengths` ids, padded on the right, then one by one."""
        batch, width, steps = len(prompts), max(lengths), len(prompts[0]) - lengths[0]
        ids = np.zeros((batch, width), np.int64)
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            ids[row, :length] = prompt[:length]
        self.start(batch)
        positions = np.tile(np.arange(width), (batch, 1))
        first = self.step(ids, np.zeros(batch, np.int64), positions, lora)
        logits = [[first[row, :length]] for row, length in enumerate(lengths)]
        for step in range(steps):
            starts = np.array(lengths) + step
            tokens = np.array([[prompt[length + step]] for prompt, length in zip(prompts, lengths, strict=True)])
            out = self.step(tokens, starts, np.zeros((batch, 1), np.int64), lora)
            for row in range(batch):
                logits[row].append(out[row])
        return [np.concatenate(parts) for parts in logits]


def prompts(vocabulary: int, lengths: tuple[int, ...] = (7, 12), steps: int = 5) -> list[NDArray[Any]]:
    """Return random ids, `steps` longer than each prompt."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, vocabulary, length + steps) for length in lengths]


def reference(model: Any, ids: NDArray[Any]) -> NDArray[Any]:
    """Return Hugging Face's logits [length, V] of one sequence."""
    with torch.no_grad():
        return np.asarray(model(torch.tensor(ids)[None]).logits[0].numpy())
