"""Models whose config.json or tensors say something odd: refused, or the graph computes what transformers does.

python tests/campaigns/configs.py [--models llama,qwen2] [--every N] [--short] [-o FILE]
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from coatrt.errors import CoatError
from coatrt.export.preflight import compare
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.exportable import check_exportable
from coatrt.models.spec import DecoderSpec

if __name__ == "__main__":  # after coatrt, beside whose name lies tests/coatrt
    sys.path.append(str(Path(__file__).parents[1]))
from support.families import MODELS, Runner, export, save_model

TOLERANCE = 1e-3
_GONE = object()
_ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7,
     "mscale_all_dim": 0.3, "attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    {"rope_type": "default", "rope_theta": 77.0},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    {"full_attention": {"rope_type": "default", "rope_theta": 5e3}},
    {"full_attention": {"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0},
     "sliding_attention": {"rope_type": "dynamic", "rope_theta": 5e3, "factor": 2.0}},
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "alpha": 30.0},
    {"rope_type": "su", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
     "original_max_position_embeddings": 8},
    {"type": "linear", "factor": 2.0},
)  # fmt: skip
KEYS: dict[str, tuple[Any, ...]] = {
    "sliding_window": (4, 6, 0, -1, "4", 2.5, None, _GONE),
    "use_sliding_window": (True, False, _GONE),
    "layer_types": (
        ["sliding_attention"] * 3,
        ["full_attention", "sliding_attention", "full_attention"],
        [],
        "x",
        None,
    ),
    "max_window_layers": (0, 1, 99, _GONE),
    "no_rope_layers": ([0, 1, 0], [1, 1], [0, 0, 0], None),
    "no_rope_layer_interval": (1, 2, 0),
    "head_dim": (8, 12, 16, 24, None, _GONE),
    "attention_bias": (True, False, _GONE),
    "mlp_bias": (True, False),
    "use_qkv_bias": (True, False),
    "qk_layernorm": (True,),
    "use_parallel_residual": (True,),
    "parallel_attn": (True,),
    "partial_rotary_factor": (0.25, 0.5, 1.0),
    "rope_theta": (50.0, 1e6, None, _GONE),
    "rope_scaling": (*_ROPES, None, [], "linear"),
    "rope_parameters": (*_ROPES, None, _GONE),
    "hidden_act": ("gelu", "silu", "relu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", None, _GONE),
    "hidden_activation": ("silu", "gelu_pytorch_tanh", "relu"),
    "rms_norm_eps": (0.2, 1e-12, None, "1e-5", _GONE),
    "layer_norm_eps": (0.2, _GONE),
    "norm_eps": (0.5,),
    "attention_multiplier": (0.05, 2.0, _GONE),
    "embedding_multiplier": (2.0, _GONE),
    "residual_multiplier": (0.5, _GONE),
    "logits_scaling": (3.0, 0.0, _GONE),
    "scale_embeddings": (True,),
    "query_pre_attn_scalar": (7,),
    "attn_logit_softcapping": (5.0,),
    "final_logit_softcapping": (5.0,),
    "clip_qkv": (0.01,),
    "use_bias": (True, False),
    "use_qk_norm": (True, False),
    "use_post_norm": (True, False),
    "attention_out_bias": (True, False),
    "logit_scale": (0.7, 0.0, None, _GONE),
    "norm_epsilon": (0.2,),
    "sliding_window_pattern": (1, 2, 0, None),
    "_sliding_window_pattern": (2,),
    "rope_local_base_freq": (70.0,),
    "original_max_position_embeddings": (8, 64),
    "llama_4_scaling_beta": (0.5,),
    "no_bias": (True,),
    "tie_word_embeddings": (True, False, _GONE),
    "vocab_size": (95, 97, 0),
    "num_key_value_heads": (1, 4, None, _GONE),
    "num_attention_heads": (2, 3),
    "num_hidden_layers": (2, 4, 0),
    "intermediate_size": (64,),
    "hidden_size": (64,),
    "max_position_embeddings": (32, 4096, 0),
    "use_bidirectional_attention": (True, "all"),
    "is_causal": (False,),
    "is_decoder": (False,),
    "attention_dropout": (0.5,),
    "pretraining_tp": (2,),
    "model_type": ("llama", "mistral", "qwen2", "gemma", "granite", "olmo2", "phi3", ""),
    "architectures": (["LlamaForSequenceClassification"], []),
    "torch_dtype": ("float16",),
    "quantization_config": ({"bits": 4},),
    "cache_implementation": ("sliding_window",),
    "rope_interleaved": (True,),
    "attention_chunk_size": (4,),
}
TENSORS = ("bias", "a norm less", "a layer more", "a matrix less", "head of its own", "stray", "float8", "transposed")
"""Changes of the tensors of a model."""


def variants(model: str) -> Iterator[tuple[str, Any]]:
    """Yield every change of a model: (key, value) of config.json, and (tensor change, None)."""
    for key, values in KEYS.items():
        for value in values:
            yield key, value
    yield from ((change, None) for change in TENSORS)
    # Two keys that mean something together.
    for window, kinds in itertools.product((4, None), KEYS["layer_types"][:2]):
        yield "sliding_window+layer_types", (window, kinds)
    yield "sliding_window+use_sliding_window", (4, True)
    yield "sliding_window+use_sliding_window", (4, False)


def change(directory: Path, key: str, value: Any) -> None:
    """Make a change in a model directory."""
    path = directory / "config.json"
    if key in TENSORS:
        _change_tensors(directory / "model.safetensors", key)
        return
    config = json.loads(path.read_text())
    names, values = key.split("+"), value if "+" in key else (value,)
    for name, one in zip(names, values, strict=True):
        config.pop(name, None)
        if one is not _GONE:
            config[name] = one
        if name == "rope_scaling":  # as older files have it
            config.pop("rope_parameters", None)
            config["rope_theta"] = 1e4
    path.write_text(json.dumps(config))


def _change_tensors(path: Path, what: str) -> None:
    tensors, prefix = load_file(path), "model.layers.1."
    q = next(
        f"{prefix}self_attn.{kind}" for kind in ("q_proj", "qkv_proj") if f"{prefix}self_attn.{kind}.weight" in tensors
    )
    if what == "bias":
        tensors[f"{q}.bias"] = torch.ones(tensors[f"{q}.weight"].shape[0])
    elif what == "a norm less":
        del tensors[next(name for name in tensors if name.startswith("model.") and name.endswith("norm.weight"))]
    elif what == "a layer more":
        tensors |= {k.replace(".1.", ".3."): v.clone() for k, v in tensors.items() if k.startswith(prefix)}
    elif what == "a matrix less":
        del tensors[f"{q}.weight"]
    elif what == "head of its own":
        tensors["lm_head.weight"] = (tensors["model.embed_tokens.weight"] + 1).half().float()  # as it is exported
    elif what == "stray":
        tensors["model.layers.0.extra.weight"] = torch.ones(3)
    elif what == "float8":
        tensors[f"{q}.weight"] = tensors[f"{q}.weight"].to(torch.float8_e4m3fn)
    else:
        tensors[f"{q}.weight"] = tensors[f"{q}.weight"].T.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def outcome(directory: Path, scratch: Path) -> tuple[str, str]:
    """Return "refused", "equal" or what went wrong, and its detail."""
    try:
        checkpoint = Checkpoint.open(directory)
        spec = DecoderSpec.from_config(checkpoint.config)
        check_exportable(checkpoint, spec)
    except CoatError as error:
        return ("refused" if len(str(error).splitlines()) == 1 else "several lines"), str(error)
    except Exception as error:
        return "traceback", repr(error)
    try:
        compare(checkpoint, spec)
    except CoatError as error:
        return "refused by preflight", str(error)
    except Exception as error:
        return "traceback", repr(error)
    try:
        difference = _difference(checkpoint, scratch, min(24, spec.max_positions))
    except CoatError as error:
        return "refused at export", str(error)
    except Exception as error:
        return "transformers fails", repr(error)
    return ("equal" if difference <= TOLERANCE else "DIFFERENT"), f"{difference:.1e}"


def _difference(checkpoint: Checkpoint, scratch: Path, count: int) -> float:
    """Return how far the exported graph's logits are from those of transformers' own reading of the directory."""
    from transformers import AutoModelForCausalLM

    ids = np.random.default_rng(1).integers(0, min(90, DecoderSpec.from_config(checkpoint.config).vocabulary), count)
    runner = Runner(checkpoint, export(checkpoint, scratch))
    (found,) = runner.prefill_and_decode([ids], [count - 1])
    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None], use_cache=False).logits[0].numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def campaign(models: list[str], every: int = 1) -> tuple[Counter[str], list[str]]:
    """Return how often each outcome came, and a line for each that must not."""
    counts: Counter[str] = Counter()
    wrong = []
    for model in models:
        print(model, dict(counts), file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            save_model(Path(scratch) / "plain", model)
            for number, (key, value) in enumerate(variants(model)):
                if number % every:
                    continue
                directory = Path(scratch) / f"{number}"
                shutil.copytree(Path(scratch) / "plain", directory)
                change(directory, key, value)
                result, detail = outcome(directory, Path(scratch) / f"{number}-out")
                counts[result] += 1
                if result not in ("refused", "refused by preflight", "equal"):
                    wrong.append(f"{model}: {key} = {'absent' if value is _GONE else value}: {result}: {detail}")
                    print(wrong[-1], flush=True)
                shutil.rmtree(directory)
                shutil.rmtree(Path(scratch) / f"{number}-out", ignore_errors=True)
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--every", type=int, default=1, help="try one variant in N")
    parser.add_argument("--short", action="store_true", help="three models, one variant in 20")
    parser.add_argument("-o", "--output", type=Path, help="JSON of the outcomes")
    options = parser.parse_args()
    models = "qwen2-window-yarn,granite,mistral-window" if options.short else options.models
    counts, wrong = campaign(models.split(","), 20 if options.short else options.every)
    print(f"{sum(counts.values())} variants: {dict(counts)}")
    if options.output:
        options.output.write_text(json.dumps({"variants": sum(counts.values()), "outcomes": counts, "wrong": wrong}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
