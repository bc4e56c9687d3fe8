"""The only file here that imports coatrt: its graphs with their expected logits, its quantizers, its training step.

python benchmarks/gpu/coatrt_parts.py DIRECTORY     writes the graphs, on any machine; graphs.py runs them on a GPU
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import contract_for
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.models.checkpoint import Checkpoint
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import encode
from coatrt.quantization.quantizers import CALIBRATED
from coatrt.quantization.weight_format import WeightFormat

__all__ = ["MODELS", "Trainings", "encode_seconds", "write_graphs"]

FORMATS = (
    "fp16",
    "bf16",
    "int8",
    "int8-g32",
    "int8-g64",
    "int8-g128",
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
)
_KEYS = ("hidden", "inner", "layers", "heads", "kv_heads", "vocabulary", "tied")
MODELS: dict[str, dict[str, Any]] = {
    "tiny": dict(zip(_KEYS, (256, 512, 2, 4, 2, 512, True), strict=True)),
    "smollm2": dict(zip(_KEYS, (576, 1536, 30, 9, 3, 49152, True), strict=True)),
}
PROMPT, STEPS, CONTEXT = [3, 14, 159, 26, 5], 16, 64


def _random_llama(directory: Path, **shape: Any) -> Checkpoint:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from common import random_llama

    return random_llama(directory, **shape)


def write_graphs(directory: Path, shape: dict[str, Any], texts: Sequence[str]) -> None:
    """Write a random Llama in some formats and both activation dtypes of the cpu form, with inputs and logits.

    A directory per format holds the graphs and case.npz: tokens, LoRA, the logits of torch in float32 with the
    decoded weights, and those of each graph on the CPU.
    """
    # Graphs need ONNX Runtime, which a machine that only trains may lack.
    from coatrt.engines.runtime.options import RuntimeOptions
    from coatrt.engines.runtime.ort import OrtDecoder
    from coatrt.export.decoder import GraphForm, decoder_io, export_decoder

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = _random_llama(Path(scratch) / "model", **shape)
        codes = CodeStore(checkpoint, "absmax")
        contract = contract_for(checkpoint.matrices, 16, 32)
        rng = np.random.default_rng(0)
        lora = {name: (rng.standard_normal(size) * 0.05).astype(np.float32) for name, size in contract.shapes.items()}
        tokens = rng.integers(0, shape["vocabulary"], STEPS).tolist()
        reference = FakeQuantModel(checkpoint, codes)
        forms = [GraphForm("cpu", f"{kind}.onnx", kind, max_positions=512) for kind in ("float32", "float16")]
        for text in texts:
            config = QuantConfig.uniform(checkpoint.matrices, text)
            place = directory / text
            place.mkdir(exist_ok=True)
            arrays: dict[str, Any] = {"prompt": PROMPT, "tokens": tokens}
            for form in forms:  # each with its own weights: one graph may not read all of a shared file
                (place / form.activations).mkdir(exist_ok=True)
                export_decoder(
                    checkpoint, config, place / form.activations, forms=[form], contract=contract, codes=codes
                )
                runner = OrtDecoder(
                    place / form.activations / form.file,
                    decoder_io(checkpoint, form),
                    contract,
                    RuntimeOptions(context=CONTEXT, accuracy_level=0),
                )
                runner.set_lora(lora)
                logits = [runner.prefill([PROMPT])[0], *(runner.decode([token])[0] for token in tokens)]
                arrays[f"cpu.{form.activations}"] = np.stack(logits)
            reference.set_config(config)
            reference.set_lora(contract, {name: torch.from_numpy(value) for name, value in lora.items()})
            with torch.no_grad():
                expected = reference.logits(torch.tensor([[*PROMPT, *tokens]]))[0, len(PROMPT) - 1 :].numpy()
            np.savez_compressed(place / "case.npz", expected=expected, **arrays)
            print(text, float(np.abs(arrays["cpu.float16"] - expected).max() / np.abs(expected).max()), flush=True)
        np.savez_compressed(directory / "lora.npz", **contract.graph_inputs(lora))
        io = decoder_io(checkpoint, forms[0])
        facts = {
            "layers": io.layers,
            "kv_heads": io.kv_heads,
            "head_dim": io.head_dim,
            "vocabulary": io.vocabulary,
            "context": CONTEXT,
            "past": list(io.past_names),
            "present": list(io.present_names),
        }
        (directory / "facts.json").write_text(json.dumps(facts))


def encode_seconds(text: str, quantizer: str, N: int, K: int, tokens: int) -> dict[str, Any]:
    """Time the encoding of one random matrix on the CPU; calibrated quantizers get the moment of random inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator) * 0.02
    moment = None
    if quantizer in CALIBRATED:
        inputs = torch.randn(tokens, K, generator=generator) * (1 + torch.rand(K, generator=generator))
        moment = inputs.T @ inputs / tokens
    began = time.perf_counter()
    encode(weight, WeightFormat.parse(text), quantizer, moment, tokens)  # type: ignore[arg-type]
    return {"seconds": round(time.perf_counter() - began, 3), "threads": torch.get_num_threads()}


class Trainings:
    """PEFT's and coatrt's training of a random checkpoint, one at a time or both.

    Args:
        directory: directory for the checkpoint.
        shape: of the model, see `MODELS`.
        compute: torch device.
        length: tokens of a row.
        batch: rows of a pass; a step has two passes.
    """

    def __init__(self, directory: Path, shape: dict[str, Any], compute: str, length: int, batch: int) -> None:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import training_step

        self._parts, self._compute, self._batch = training_step, compute, batch
        there = (directory / "config.json").is_file()
        self._checkpoint = Checkpoint.open(directory) if there else _random_llama(directory, **shape)
        self._tokens = training_step.tokens_of(length)

    def run(self, name: str, steps: int, between: Callable[[int], None]) -> None:
        """Do some steps of one ("peft" or "coatrt"), calling `between` with their count before, between and after."""
        if name == "coatrt":
            ours = self._parts.OurTraining(self._checkpoint, self._tokens, self._compute, self._batch)
            ours.warm()
            ours.run(steps, between)
            return
        peft = self._parts.PeftTraining(self._checkpoint, self._tokens, self._compute, self._batch)
        for step in range(steps):
            between(step)
            peft.step(step)
        between(steps)

    def compare(self, steps: int) -> dict[str, Any]:
        """Return the figures of benchmarks/training_step.py after a quarter of some steps done in turn."""
        peft = self._parts.PeftTraining(self._checkpoint, self._tokens, self._compute, self._batch)
        ours = self._parts.OurTraining(self._checkpoint, self._tokens, self._compute, self._batch)
        ours.warm()
        found: dict[str, Any] = self._parts.figures(self._parts.alternate(peft, ours, steps, self._compute), steps // 4)
        return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", choices=list(MODELS), default="tiny", help="shape of the random model")
    parser.add_argument("--formats", default=",".join(FORMATS))
    given = parser.parse_args()
    write_graphs(given.directory, MODELS[given.model], given.formats.split(","))
