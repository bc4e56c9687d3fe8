"""ONNX Runtime against torch on SmolLM2-135M: every format on all matrices, five random maps, LoRA bound.

python benchmarks/parity.py   (needs out/demo/adapter: make demo)
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import random_config, save_result, smollm2

from coatrt.adapter.adapter import Adapter
from coatrt.configs.config import QuantConfig
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.ort import OrtDecoder
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.export.decoder import GraphForm, decoder_io, export_decoder
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.code_cache import CodeStore

FORMATS = (
    "fp16",
    "bf16",
    "int8",
    "int8-g64",
    "int4-g32",
    "int4-g64",
    "int4-g128",
    "fp8",
    "nvfp4",
    "nf2-g64",
    "nf3-g64",
    "nf4-g64",
    "nf8-g64",
    "nf3-g64-dq4-bf16-256",
    "nf2-g16-dq2-fp32-16",
)
PROMPT = [504, 3575, 282, 4649, 314]
OTHER = [9707, 28, 506, 1462, 314, 260, 253, 3013, 29]
STEPS = 16
FORM = GraphForm("cpu", "cpu.onnx", "float32")


def decoder(
    checkpoint: Checkpoint, config: QuantConfig, adapter: Adapter, codes: CodeStore, work: Path, batch: int = 1
) -> OrtDecoder:
    """Export a configuration and load it."""
    with tempfile.TemporaryDirectory(dir=work) as directory:
        path = Path(directory)
        export_decoder(checkpoint, config, path, forms=[FORM], contract=adapter.description.contract, codes=codes)
        return OrtDecoder(
            path / FORM.file,
            decoder_io(checkpoint, FORM),
            adapter.description.contract,
            RuntimeOptions(batch=batch, context=64, accuracy_level=0),
        )


def teacher_forced(runner: OrtDecoder, tokens: list[int]) -> Any:
    """Return the logits after the prompt and after each of the tokens."""
    return np.stack([runner.prefill([PROMPT])[0], *(runner.decode([token])[0] for token in tokens)])


def main() -> None:
    """Compare everything and check the limit of 1e-3."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path, default=Path("out/demo/adapter"))
    adapter, checkpoint = Adapter.from_pretrained(parser.parse_args().adapter), smollm2()
    codes = adapter.codes(checkpoint)
    reference = FakeQuantModel(checkpoint, codes)
    rng = np.random.default_rng(5)
    configs = {text: QuantConfig.uniform(checkpoint.matrices, text) for text in FORMATS}
    configs |= {f"random {i}": random_config(adapter.description.space, rng) for i in range(5)}
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in configs.items():
            lora = adapter.emit(
                config if adapter.description.space.contains(config) else adapter.description.space.uniform("int8")
            )
            runner = decoder(checkpoint, config, adapter, codes, Path(scratch))
            arrays = {key: tensor.numpy() for key, tensor in lora.items()}
            runner.set_lora(arrays)
            logits = runner.prefill([PROMPT])[0]
            tokens: list[int] = []
            for _ in range(STEPS):
                tokens.append(int(logits.argmax()))
                logits = runner.decode([tokens[-1]])[0]
            outputs = teacher_forced(runner, tokens)
            reference.set_config(config)
            reference.set_lora(adapter.description.contract, lora)
            with torch.no_grad():
                expected = reference.logits(torch.tensor([PROMPT + tokens]))[0, len(PROMPT) - 1 :].numpy()
            runner.set_lora(None)
            effect = np.abs(teacher_forced(runner, tokens) - outputs).max()
            top = np.abs(expected).max()
            rows[name] = {
                "difference": float(np.abs(outputs - expected).max() / top),
                "lora_effect": float(effect / top),
            }
            print(f"{name:<24} {rows[name]['difference']:.2e}  LoRA effect {rows[name]['lora_effect']:.2f}", flush=True)
        runner = decoder(checkpoint, configs["random 0"], adapter, codes, Path(scratch), batch=2)
        runner.set_lora({key: tensor.numpy() for key, tensor in adapter.emit(configs["random 0"]).items()})
        together = runner.prefill([PROMPT, OTHER])
        alone = [runner.prefill([prompt, prompt])[0] for prompt in (PROMPT, OTHER)]
        batch = float(np.abs(together - np.stack(alone)).max() / np.abs(together).max())
    save_result("parity", "python benchmarks/parity.py", {"relative": rows, "unequal_batch": batch, "steps": STEPS})
    if max(row["difference"] for row in rows.values()) > 1e-3 or batch > 1e-3:
        sys.exit("over 1e-3")


if __name__ == "__main__":
    main()
