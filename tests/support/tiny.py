"""Tiny random models with a byte tokenizer, and texts and options to train them with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEXTS = [
    f"{word} the {word} sat on the mat. " * 30 for word in ("cat", "dog", "hen", "owl", "fox", "bee") for _ in "ab"
]


def save_tiny_llama(directory: Path, *, tied: bool = True, seed: int = 0, **changes: object) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    options: dict[str, object] = {
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": 256,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**options, **changes}))
    model.save_pretrained(directory)
    save_byte_tokenizer(directory)
    return directory


def save_byte_tokenizer(directory: Path) -> None:
    """Save a tokenizer with one token per byte, 256 as the end token, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    fast.save_pretrained(directory)


def text_data(model: Path, texts: Sequence[str] = TEXTS, held_out: Sequence[str] | None = None) -> Any:
    """Return texts as training data: blocks of 32 tokens of a model's tokenizer."""
    from coatrt.data.text import text_task
    from coatrt.models.tokenizer import load_tokenizer

    return text_task(load_tokenizer(model), texts, 32, held_out=held_out)


def tiny_options(**changes: Any) -> Any:
    from coatrt.training.options import TrainOptions

    options: dict[str, Any] = {
        "formats": ("nf3-g32", "int4-g32", "nvfp4", "fp8", "int8", "nf4-g32-dq8-fp16-64"),
        "preset": "coatrt",
        "quantizer": "mse",
        "steps": 6,
        "batch": 4,
        "max_length": 32,
        "learning_rate": 1e-2,
        "theta_rate": 1e-2,
        "calibration": 4,
        "evaluation": 4,
        "budgets": (5.0,),
        "checkpoint_every": 2,
    }
    return TrainOptions(**{**options, **changes})


def lora_elements(model: Any, rank: int = 16) -> int:
    """Return the number of elements of a graph's LoRA inputs: q|k|v and gate|up have a joint A, and a B with zeros."""
    joint = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
    groups: dict[tuple[int, str], list[Any]] = {}
    for matrix in model.targets:
        groups.setdefault((matrix.layer, joint.get(matrix.kind, matrix.kind)), []).append(matrix)
    return sum(rank * len(group) * (group[0].K + sum(m.N for m in group)) for group in groups.values())
