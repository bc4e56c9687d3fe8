"""Shared fixtures: tiny random models saved as Hugging Face directories."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(2)


def save_tiny_llama(directory: Path, *, tied: bool = True, seed: int = 0, **changes: object) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    options: dict[str, object] = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": tied, "initializer_range": 0.1,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**options, **changes}))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")
