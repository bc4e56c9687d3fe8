"""A configuration as a GGUF file, and its LoRA as a second one, for llama.cpp."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from coatrt.configs.lora_contract import LoraContract
from coatrt.errors import CheckpointError
from coatrt.export.checkpoints.gguf_tokenizer import check_tokenizer, write_tokenizer
from coatrt.export.checkpoints.gguf_weights import gguf_tensor
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.matrices import HEAD
from coatrt.models.spec import DecoderSpec
from coatrt.models.transformers_config import complete_config
from coatrt.quantization.codec import QuantizedMatrix

__all__ = ["check_gguf", "write_gguf", "write_gguf_lora"]

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""model_type → architecture of llama.cpp."""


def check_gguf(checkpoint: Checkpoint) -> None:
    """Refuse a model that cannot be written as GGUF.

    Raises:
        CheckpointError: its family, rotary positions, windows or tokenizer have no form there that is known here.
    """
    spec, where = DecoderSpec.from_config(checkpoint.config), checkpoint.directory
    if spec.family not in _ARCHITECTURES:
        raise CheckpointError(f"{where} is {spec.family}; GGUF is written of {', '.join(_ARCHITECTURES)}")
    if spec.activation != "silu" or any(window is not None for window in spec.windows):
        raise CheckpointError(
            f"{where} has a sliding window or another activation than silu; GGUF is not written of it"
        )
    rope = complete_config(checkpoint.config).rope_parameters
    known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
    known |= {"low_freq_factor", "high_freq_factor"} if rope.get("rope_type") == "llama3" else set()
    unknown = [key for key, value in rope.items() if key not in known and value is not None]
    if unknown or set(spec.rotary) != {0} or len(spec.rotations[0].frequencies) * 2 != spec.head_dim:
        raise CheckpointError(
            f"{where} has rotary positions with {', '.join(unknown) or 'other widths'}; GGUF lacks them"
        )
    check_tokenizer(where)


def write_gguf(path: Path, checkpoint: Checkpoint, matrices: Iterator[tuple[str, QuantizedMatrix]]) -> dict[str, str]:
    """Write a model as GGUF.

    Args:
        path: the file.
        checkpoint: the model, see `check_gguf`.
        matrices: (name, encoded matrix) of every matrix.

    Returns:
        matrix → its GGUF type, where that takes 16 bits and the format fewer.
    """
    import gguf

    check_gguf(checkpoint)
    spec = DecoderSpec.from_config(checkpoint.config)
    architecture = _ARCHITECTURES[spec.family]
    names = _names(architecture, spec.layers)
    writer = gguf.GGUFWriter(str(path), architecture, use_temp_file=False)
    _write_keys(writer, checkpoint, spec)
    write_tokenizer(writer, checkpoint.directory, spec.vocabulary)
    wide, types = dict[str, str](), Counter[str]()
    for name, matrix in matrices:
        stored = gguf_tensor(matrix, _rows(name, architecture, spec, matrix.N))
        raw = gguf.GGMLQuantizationType[stored.type]
        writer.add_tensor(f"{names[name]}.weight", stored.data, raw_dtype=raw)
        types[stored.type] += matrix.N * matrix.K
        if stored.type in ("F16", "BF16") and matrix.format.has_scales:
            wide[name] = stored.type
    skipped = {f"{name}.weight" for name in checkpoint.matrices.names} | {f"{HEAD}.weight"}
    for name in checkpoint.tensors:
        if name in skipped or name.endswith("rotary_emb.inv_freq"):
            continue
        module, _, part = name.rpartition(".")
        if module not in names:
            raise CheckpointError(f"{checkpoint.directory} has the tensor {name}, for which GGUF has no name")
        values = checkpoint.tensor(name).float()
        order = _rows(module, architecture, spec, len(values)) if part == "bias" else None
        writer.add_tensor(f"{names[module]}.{part}", (values if order is None else values[order]).numpy())
    file_type = {"Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0", "BF16": "MOSTLY_BF16"}.get(
        max(types, key=types.__getitem__)
    )
    writer.add_file_type(gguf.LlamaFileType[file_type or "MOSTLY_F16"])
    _finish(writer)
    return wide


def write_gguf_lora(
    path: Path, checkpoint: Checkpoint, tensors: Mapping[str, NDArray[np.float32]], contract: LoraContract
) -> None:
    """Write the LoRA of a configuration as GGUF, for llama.cpp's --lora.

    Args:
        path: the file.
        checkpoint: its model.
        tensors: every tensor of the contract, B times alpha/rank.
        contract: names, ranks and alpha; llama.cpp applies alpha/rank itself.
    """
    import gguf

    spec = DecoderSpec.from_config(checkpoint.config)
    architecture = _ARCHITECTURES[spec.family]
    names = _names(architecture, spec.layers)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", contract.alpha)
    for tensor in contract.tensors:
        B = (tensors[tensor.B] / np.float32(contract.scale(tensor))).T
        order = _rows(tensor.matrix, architecture, spec, tensor.N)
        stored = f"{names[tensor.matrix]}.weight"
        writer.add_tensor(f"{stored}.lora_a", np.ascontiguousarray(tensors[tensor.A].T))
        writer.add_tensor(f"{stored}.lora_b", np.ascontiguousarray(B if order is None else B[order.numpy()]))
    _finish(writer)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _names(architecture: str, layers: int) -> dict[str, str]:
    """Return Hugging Face module → name in GGUF."""
    import gguf

    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, layers)
    parts = ["input_layernorm", "post_attention_layernorm"]
    parts += [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    parts += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    modules = ["model.embed_tokens", "model.norm", HEAD]
    modules += [f"model.layers.{layer}.{part}" for layer in range(layers) for part in parts]
    return {module: str(table.get_name(module)) for module in modules if table.get_name(module) is not None}


def _rows(name: str, architecture: str, spec: DecoderSpec, N: int) -> torch.Tensor | None:
    """Return the order of a matrix's rows: llama.cpp's llama rotates neighbouring dimensions, not halves of a head."""
    heads = {"q_proj": spec.heads, "k_proj": spec.kv_heads}.get(name.rsplit(".", 1)[-1])
    if architecture != "llama" or heads is None:
        return None
    return torch.arange(N).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _write_keys(writer: Any, checkpoint: Checkpoint, spec: DecoderSpec) -> None:
    import gguf

    config = complete_config(checkpoint.config)
    rope = config.rope_parameters
    writer.add_name(checkpoint.directory.name)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_layer_norm_rms_eps(spec.epsilon)
    writer.add_vocab_size(spec.vocabulary)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind == "llama3":  # its factors on the wavelengths
        plain = 1 / float(rope["rope_theta"]) ** (np.arange(0, spec.head_dim, 2) / spec.head_dim)
        factors = plain / np.array(spec.rotations[0].frequencies)
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    elif kind != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if kind == "yarn":
            original = rope.get("original_max_position_embeddings") or spec.max_positions
            writer.add_rope_scaling_orig_ctx_len(int(original))
