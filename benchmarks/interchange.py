"""Configurations of the demo's adapter in llama.cpp and in transformers, against coatrt; and codes with zero points.

python benchmarks/interchange.py   (needs out/demo: make demo; pip install llama-cpp-python==0.3.36 compressed-tensors)

Losses are of the same held-out tokens: coatrt's in torch, with the weights decoded in float32 (float16 where the
exported file holds float16). llama.cpp multiplies int4 and int8 by activations that it rounds to 8 bits in blocks of
32; "same values in F16" is a file without them, whose loss shows what that rounding does.
"""

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import save_result, smollm2
from cpu_decode import held_out_blocks

from coatrt.adapter.adapter import Adapter
from coatrt.configs.config import QuantConfig
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.export.checkpoints.export import export_checkpoint
from coatrt.export.checkpoints.gguf import write_gguf
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.codec import QuantizedMatrix, decode, encode
from coatrt.quantization.weight_format import WeightFormat

GROUP = 64  # divides SmolLM2's widths


def mean_loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Return the mean loss of logits [S, V] of tokens [S]."""
    return float(torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[1:]))


def ours(model: FakeQuantModel, blocks: torch.Tensor) -> float:
    """Return our loss with the weights and the LoRA that the model has."""
    with torch.no_grad():
        return float(np.mean([mean_loss(model.logits(block[None])[0], block) for block in blocks]))


def llama_loss(path: Path, lora: Path | None, blocks: torch.Tensor) -> float:
    """Return llama.cpp's loss of the same tokens."""
    from llama_cpp import Llama

    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        size = blocks.shape[1]
        model = Llama(
            str(path),
            n_ctx=size,
            n_batch=size,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            lora_path=str(lora) if lora is not None else None,
            verbose=False,
        )
    losses = []
    for block in blocks:
        model.reset()
        model.eval(block.tolist())
        losses.append(mean_loss(torch.from_numpy(model.scores[: len(block)].copy()), block))
    return float(np.mean(losses))


def half_values(matrices: Iterator[tuple[str, QuantizedMatrix]]) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Yield the matrices as float16 values."""
    for name, matrix in matrices:
        yield name, QuantizedMatrix(WeightFormat("fp16"), matrix.N, matrix.K, decode(matrix, torch.float16))


def in_llama(adapter: Adapter, checkpoint: Checkpoint, config: QuantConfig, blocks: torch.Tensor) -> dict[str, Any]:
    """Return the losses of a configuration with and without its LoRA, ours and llama.cpp's."""
    codes = adapter.codes(checkpoint)
    model = FakeQuantModel(checkpoint, codes)
    with tempfile.TemporaryDirectory() as name:
        made = export_checkpoint(adapter, config, Path(name) / "gguf", "gguf")
        plain = Path(name) / "f16.gguf"
        write_gguf(plain, checkpoint, half_values((n, codes.get(n, f)) for n, f in config.formats.items()))
        model.set_config(config)
        model.set_weights((n, decode(codes.get(n, config[n]), torch.float16)) for n in made.wide)
        result: dict[str, Any] = {
            "formats": config.counts,
            "bits_per_weight": config.average_bits(checkpoint.matrices),
            "file_bits_per_weight": 8 * made.model.stat().st_size / checkpoint.matrices.parameters,
            "matrices_of_16_bits": len(made.wide),
        }
        for label, lora in (("without_lora", None), ("with_lora", made.lora)):
            model.set_lora(adapter.description.contract, adapter.emit(config) if lora is not None else None)
            result[label] = {
                "coatrt": ours(model, blocks),
                "llama.cpp": llama_loss(made.model, lora, blocks),
                "llama.cpp, same values in F16": llama_loss(plain, lora, blocks),
            }
    return result


def in_transformers(adapter: Adapter, config: QuantConfig, blocks: torch.Tensor) -> dict[str, Any]:
    """Return how the decompressed weights and the logits of transformers and PEFT differ from ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    checkpoint = adapter.checkpoint()
    codes = adapter.codes(checkpoint)
    with tempfile.TemporaryDirectory() as name:
        made = export_checkpoint(adapter, config, Path(name) / "ct")
        size = sum(path.stat().st_size for path in made.model.glob("model-*.safetensors"))
        theirs = AutoModelForCausalLM.from_pretrained(made.model, dtype="auto")
        theirs.hf_quantizer.compressor.decompress_model(theirs)
        state, equal = theirs.state_dict(), 0
        weights = {n: decode(codes.get(n, f), torch.float16) for n, f in config.formats.items()}
        for n, weight in weights.items():
            equal += torch.equal(state[f"{n}.weight"].half(), weight)
        peft = PeftModel.from_pretrained(theirs.to(torch.float32), made.lora).eval()
        with torch.no_grad():
            expected = peft(blocks[:1]).logits
    model = FakeQuantModel(checkpoint, codes)
    model.set_weights((n, weight.float()) for n, weight in weights.items())
    model.set_lora(adapter.description.contract, adapter.emit(config))
    with torch.no_grad():
        logits = model.logits(blocks[:1])
    return {
        "formats": config.counts,
        "matrices": len(weights),
        "equal_bit_for_bit": equal,
        "matrices_of_16_bits": len(made.wide),
        "file_bits_per_weight": 8 * size / checkpoint.matrices.parameters,
        "largest_logit_difference": float((logits - expected).abs().max() / expected.abs().max()),
    }


def zero_points(checkpoint: Checkpoint, blocks: torch.Tensor) -> dict[str, Any]:
    """Return losses of 4-bit codes with zero points, as AWQ's, and of their values encoded again in our formats."""
    model = FakeQuantModel(checkpoint, None)  # type: ignore[arg-type]
    result = {"fp16": ours(model, blocks)}
    stored = {}
    for matrix in checkpoint.matrices.targets:
        weight = checkpoint.tensor(f"{matrix.name}.weight").float().view(matrix.N, -1, GROUP)
        low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).half().float().clamp(min=1e-8)[..., None]
        zero = (-low[..., None] / scale).round()
        codes = ((weight / scale).round() + zero).clamp(0, 15) - zero
        stored[matrix.name] = (codes * scale).view(matrix.N, matrix.K)
    model.set_weights(stored.items())
    result[f"4 bits with zero points, groups of {GROUP}: exact in int8-g{GROUP}"] = ours(model, blocks)
    for fmt in ("int4-g64", "int4-g32", "nf4-g64", "nf4-g32", "int8"):
        model.set_weights((name, decode(encode(weight, fmt, "mse"))) for name, weight in stored.items())
        result[f"encoded again in {fmt}"] = ours(model, blocks)
    return result


def main() -> None:
    """Measure and write benchmarks/results/interchange.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("out/demo"))
    parser.add_argument("--blocks", type=int, default=8)
    options = parser.parse_args()
    adapter, checkpoint = Adapter.from_pretrained(options.demo / "adapter"), smollm2()
    blocks, model = held_out_blocks(options.blocks), adapter.description.model
    mix = QuantConfig.load(options.demo / "rtx-5090" / "configuration.json", model)
    integers = next(str(fmt) for fmt in adapter.description.formats if fmt.kind == "int4")
    result = {
        "tokens": int(blocks.numel() - len(blocks)),
        "llama": [
            in_llama(adapter, checkpoint, config, blocks)
            for config in (mix, adapter.description.space.uniform(integers))
        ],
        "transformers": in_transformers(adapter, mix, blocks),
        "zero_points": zero_points(checkpoint, blocks),
    }
    save_result("interchange", "python benchmarks/interchange.py", result)


if __name__ == "__main__":
    main()
