"""Models for backend.py: a tiny one that torch computes too, and large ones of random codes, never encoded."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coatrt_parts import FORMATS, _random_llama
from decoder import Shape

from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import DecoderIO, LoraContract, contract_for
from coatrt.engines.runtime.cuda import CudaDecoder
from coatrt.engines.runtime.cuda_driver import open_driver
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.errors import BuildError
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.export.decoder import GraphForm, decoder_io, export_decoder, write_graphs
from coatrt.export.weights import codes as storage
from coatrt.models.matrices import ModelMatrices, matrices_of
from coatrt.models.spec import DecoderSpec
from coatrt.quantization.code_cache import CodeStore
from coatrt.quantization.codec import QuantizedMatrix
from coatrt.quantization.weight_format import WeightFormat

__all__ = ["MAPS", "PARITY_FORMATS", "Parity", "RandomModel", "driver_memory", "loaded", "refused", "torch_free"]

PARITY_FORMATS = FORMATS
FORM = GraphForm("cuda", "cuda.onnx", "float16", max_positions=4096)
TINY = {"hidden": 256, "inner": 512, "layers": 2, "heads": 4, "kv_heads": 2, "vocabulary": 512, "tied": True}
PROMPTS, STEPS = ([3, 14, 159, 26, 5], [8, 300]), 16


def _third_int8(layer: int, kind: str, rest: str) -> str:
    return "int8-g128" if (layer * 7 + len(kind)) % 3 == 0 else rest


MAPS: dict[str, Callable[[int, str], str]] = {
    "int4-g64": lambda layer, kind: "int4-g64",
    "mixed": lambda layer, kind: _third_int8(layer, kind, "int4-g64"),
    "mixed with nvfp4": lambda layer, kind: _third_int8(
        layer, kind, "int4-g64" if (layer + len(kind)) % 2 or layer < 0 else "nvfp4"
    ),
}
"""Name → format of a matrix, by its layer (−1 for the tables) and kind."""


def driver_memory(dry: bool) -> int:
    """Return the free bytes of the GPU."""
    return 0 if dry else open_driver().memory()[0]


class Parity:
    """A tiny random Llama: torch in float32 with the decoded weights against the backend, LoRA on.

    Args:
        scratch: directory for it and its graphs.
        dry: on the CPU.
    """

    def __init__(self, scratch: Path, dry: bool) -> None:
        self._scratch, self._provider = scratch, "cpu" if dry else "cuda"
        self._checkpoint = _random_llama(scratch / "model", **TINY)
        self._codes = CodeStore(self._checkpoint, "absmax")
        self._contract = contract_for(self._checkpoint.matrices, 16, 32)
        rng = np.random.default_rng(0)
        shapes = self._contract.shapes.items()
        self._lora = {name: (rng.standard_normal(size) * 0.05).astype(np.float32) for name, size in shapes}
        self._tokens = rng.integers(0, TINY["vocabulary"], (STEPS, len(PROMPTS))).tolist()
        self._reference = FakeQuantModel(self._checkpoint, self._codes)

    def _graph(self, text: str) -> Path:
        directory = self._scratch / text
        if not directory.exists():
            directory.mkdir()
            config = QuantConfig.uniform(self._checkpoint.matrices, text)
            export_decoder(
                self._checkpoint, config, directory, forms=[FORM], contract=self._contract, codes=self._codes
            )
            facts = {"io": asdict(decoder_io(self._checkpoint, FORM))}
            (directory / "io.json").write_text(json.dumps(facts))
        return directory / FORM.file

    def _decoder(self, text: str, **more: Any) -> CudaDecoder:
        options = RuntimeOptions(batch=len(PROMPTS), context=64)
        io = decoder_io(self._checkpoint, FORM)
        return CudaDecoder(self._graph(text), io, self._contract, options, provider=self._provider, **more)

    def check(self, text: str) -> dict[str, Any]:
        """Return the largest difference from torch over the largest logit, and that of graph replay from none."""
        decoder = self._decoder(text)
        decoder.set_lora(self._lora)
        runs = []
        for replays in (decoder._replays, False):
            decoder._replays = replays
            logits = [decoder.prefill(PROMPTS), *(decoder.decode(row) for row in self._tokens)]
            runs.append(np.stack(logits, axis=1))  # [B, 1 + steps, V]
        self._reference.set_config(QuantConfig.uniform(self._checkpoint.matrices, text))
        self._reference.set_lora(self._contract, {name: torch.from_numpy(value) for name, value in self._lora.items()})
        errors, largest = [], 0.0
        for row, prompt in enumerate(PROMPTS):
            ids = [*prompt, *(step[row] for step in self._tokens)]
            with torch.no_grad():
                expected = self._reference.logits(torch.tensor([ids]))[0, len(prompt) - 1 :].numpy()
            errors.append([float(np.abs(made[row] - expected).max() / np.abs(expected).max()) for made in runs])
            largest = max(largest, float(np.abs(expected).max()))
        decoder.set_lora(None)
        base = decoder.prefill(PROMPTS)
        return {
            "relative_error": max(first for first, _ in errors),
            "relative_error_no_graph": max(second for _, second in errors),
            "replay_against_none": float(np.abs(runs[0] - runs[1]).max() / largest),
            "lora_effect": float(np.abs(runs[1][:, 0] - base).max() / largest),
        }

    def no_room(self) -> dict[str, Any]:
        """Load with the GPU almost full and return the refusal; then load again."""
        driver = open_driver()
        hold = driver.allocate(driver.memory()[0] - (300 << 20))
        try:
            self._decoder("fp16")
            said = "nothing: it loads"
        except BuildError as error:
            said = str(error)
        finally:
            driver.free(hold)
        self._decoder("fp16").prefill(PROMPTS)
        return {"said": said}


def refused(dry: bool) -> dict[str, Any]:
    """Return the refusal of caches larger than any GPU."""
    io = DecoderIO(32, 8, 128, 32768, None, "float16", 32768)
    try:
        CudaDecoder(Path("no.onnx"), io, None, RuntimeOptions(batch=64, context=32768), weight_bytes=4 << 30)
    except BuildError as error:
        return {"said": str(error)}
    return {"said": "nothing"}


def torch_free(scratch: Path, dry: bool) -> dict[str, Any]:
    """Run a graph in a process that has not imported torch: CUDA's libraries must be found without it."""
    program = """
import json, sys, time
from pathlib import Path
from coatrt.configs.lora_contract import DecoderIO
from coatrt.engines.runtime.cuda import CudaDecoder
directory, provider = Path(sys.argv[1]), sys.argv[2]
io = DecoderIO(**json.loads((directory / "io.json").read_text())["io"])
began = time.perf_counter()
decoder = CudaDecoder(directory / "cuda.onnx", io, None, provider=provider)
loaded = time.perf_counter() - began
decoder.prefill([[1, 2, 3]])
made = decoder.decode([4])
print(json.dumps({"load_s": round(loaded, 3), "torch": "torch" in sys.modules, "finite": bool((made == made).all())}))
"""
    directory = scratch / "plain"
    checkpoint = _random_llama(scratch / "plain model", **TINY)
    directory.mkdir(exist_ok=True)
    export_decoder(checkpoint, QuantConfig.uniform(checkpoint.matrices, "int4-g64"), directory, forms=[FORM])
    (directory / "io.json").write_text(json.dumps({"io": asdict(decoder_io(checkpoint, FORM))}))
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, str(directory), "cpu" if dry else "cuda"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode:
        return {"failed": (done.stderr or done.stdout)[-500:]}
    return {**json.loads(done.stdout.splitlines()[-1]), "process_s": round(time.perf_counter() - began, 2)}


@cache
def _matrix(N: int, K: int, text: str) -> QuantizedMatrix:
    """Return a matrix of random codes; all layers share it, so the weights file is small."""
    fmt = WeightFormat.parse(text).effective(K)
    generator, width = torch.Generator().manual_seed(N + K), fmt.padded(K)
    if fmt.kind == "nvfp4":
        codes = torch.randint(0, 16, (N, width), generator=generator, dtype=torch.uint8)
        scales = (torch.rand(N, width // 16, generator=generator) * 4 + 0.5).to(torch.float8_e4m3fn)
        return QuantizedMatrix(fmt, N, K, codes, scales, constant=2.0**-10)
    most = 8 if fmt.kind == "int4" else 127
    codes = torch.randint(-most, most, (N, width), generator=generator, dtype=torch.int8)
    # Equal layers add up: with larger weights the residual stream of 32 layers overflows float16.
    scales = torch.full((N, width // fmt.block), 0.5 / most / K**0.5, dtype=torch.float16)
    return QuantizedMatrix(fmt, N, K, codes, scales)


class RandomModel:
    """A Llama of random codes.

    Args:
        shape: of the model.
        formats: (layer, kind) → weight format.
        lora: whether the graph has LoRA inputs.
    """

    def __init__(self, shape: Shape, formats: Callable[[int, str], str], lora: bool) -> None:
        self._formats = formats
        heads, kv = shape.heads * shape.width, shape.kv_heads * shape.width
        sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
        if not shape.tied:
            sizes["lm_head.weight"] = sizes["model.embed_tokens.weight"]
        parts = {
            "self_attn.q_proj": (heads, shape.hidden),
            "self_attn.k_proj": (kv, shape.hidden),
            "self_attn.v_proj": (kv, shape.hidden),
            "self_attn.o_proj": (shape.hidden, heads),
            "mlp.gate_proj": (shape.inner, shape.hidden),
            "mlp.up_proj": (shape.inner, shape.hidden),
            "mlp.down_proj": (shape.hidden, shape.inner),
        }
        for layer in range(shape.layers):
            sizes |= {f"model.layers.{layer}.{name}.weight": size for name, size in parts.items()}
        self.matrices: ModelMatrices = matrices_of(sizes, shape.tied)
        config = {
            "model_type": "llama",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.inner,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.width,
            "vocab_size": shape.vocabulary,
            "max_position_embeddings": FORM.max_positions,
            "tie_word_embeddings": shape.tied,
            "hidden_act": "silu",
        }
        self._spec = DecoderSpec.from_config(config)
        self.contract: LoraContract | None = contract_for(self.matrices, 16, 32) if lora else None
        spec, rows = self._spec, FORM.max_positions
        self.io = DecoderIO(spec.layers, spec.kv_heads, spec.head_dim, spec.vocabulary, None, "float16", rows)
        self.weight_gb = 0.0

    def _codes(self) -> Iterator[tuple[str, QuantizedMatrix]]:
        for matrix in self.matrices.matrices:
            found = _matrix(matrix.N, matrix.K, self._formats(matrix.layer, matrix.kind))
            self.weight_gb = round(self.weight_gb + found.format.nbytes(matrix.N, matrix.K) / 1e9, 4)
            yield matrix.name, found

    def write(self, directory: Path) -> None:
        """Write the graph."""
        ones = torch.ones(self._spec.hidden)

        def small(name: str) -> torch.Tensor | None:
            return ones if name.endswith("norm.weight") and "self_attn" not in name else None

        packed: dict[Any, torch.Tensor] = {}
        pack = storage._pack

        def once(codes: torch.Tensor, kind: str) -> torch.Tensor:  # equal shapes have equal codes here
            key = (kind, codes.shape)
            if key not in packed:
                packed[key] = pack(codes, kind)
            return packed[key]

        storage._pack = once
        write_graphs(
            directory,
            self._spec,
            self._codes(),
            small,
            [FORM],
            [FORM.max_positions],
            tied=self.matrices.tied,
            contract=self.contract,
        )
        storage._pack = pack
        _matrix.cache_clear()

    def random_lora(self, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
        """Return random tensors of the contract."""
        if self.contract is None:
            return None
        shapes = self.contract.shapes.items()
        return {name: (rng.random(size, np.float32) - 0.5) * np.float32(0.02) for name, size in shapes}


def loaded(directory: Path, model: RandomModel, dry: bool) -> CudaDecoder:
    """Return a decoder of 2,048 slots."""
    options = RuntimeOptions(context=64 if dry else 2048)
    provider = "cpu" if dry else "cuda"
    return CudaDecoder(directory / FORM.file, model.io, model.contract, options, provider=provider)
