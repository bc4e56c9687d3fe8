"""Preflight: compares the graph with transformers' modules, one layer at a time, on a few tokens."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from coatrt.devices.environment import versions
from coatrt.errors import CheckpointError, reason
from coatrt.export.decoder import write_graphs
from coatrt.export.graph import GraphForm
from coatrt.models import spec as spec_module
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.exportable import check_exportable
from coatrt.models.matrices import EMBEDDING, HEAD
from coatrt.models.modules import empty_model
from coatrt.models.spec import DecoderSpec
from coatrt.models.transformers_config import complete_config
from coatrt.quantization.codec import encode
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.disk import cache_directory, is_cached, writing
from coatrt.system.progress import Progress, silent
from coatrt.system.scratch import scratch

__all__ = ["TOLERANCE", "compare", "preflight"]

TOLERANCE = 1e-5
"""Largest difference allowed, relative to the largest logit; float32 rounding alone gives about 1e-6."""

_TOKENS = 24
_WINDOW = 5  # replaces any attention window, so that a few tokens reach beyond it
_ROWS = 64  # rows of the embedding and the head that are compared
_MAX_POSITION = 16384  # rotary tables are compared up to this position


def preflight(checkpoint: Checkpoint, progress: Progress = silent) -> None:
    """Refuse a model whose graph would compute other logits than transformers.

    The first two layers, the last and one of each kind are compared, each alone between embedding and head, at the
    first positions and at the last. Only one layer is in memory at a time. Attention windows are shortened on both
    sides. A pass is cached for this model, this code and these versions of the libraries.

    Args:
        checkpoint: the model.
        progress: called after every layer.

    Raises:
        CheckpointError: the logits differ by more than `TOLERANCE`, or the model cannot be exported or loaded.
    """
    spec = DecoderSpec.from_config(checkpoint.config)
    check_exportable(checkpoint, spec)
    marker = cache_directory() / "preflight" / _identity(checkpoint)
    if not is_cached(marker):
        compare(checkpoint, spec, progress)
        with suppress(OSError):
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()


def _identity(checkpoint: Checkpoint) -> str:
    """Return a hash of the model, the code that reads and writes it, and the libraries' versions."""
    digest = hashlib.sha256(f"{checkpoint.fingerprint} {json.dumps(versions())}".encode())
    for folder in (Path(__file__).parent, Path(spec_module.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def compare(checkpoint: Checkpoint, spec: DecoderSpec, progress: Progress = silent) -> float:
    """Return the largest difference of logits, relative to the largest logit; see `preflight`.

    Raises:
        CheckpointError: the difference exceeds `TOLERANCE`.
    """
    part = _Part(checkpoint)
    layers, largest = _layers(checkpoint, spec), 0.0
    count = min(_TOKENS, spec.max_positions)
    starts = sorted({0, min(spec.max_positions, _MAX_POSITION) - count})
    ids = torch.arange(count)[None] % part.rows
    for number, layer in enumerate(layers, 1):
        pairs = zip(part.transformers_logits(layer, ids, starts), part.graph_logits(layer, ids, starts), strict=True)
        for start, (expected, logits) in zip(starts, pairs, strict=True):
            if not (np.isfinite(expected).all() and expected.any()):
                raise CheckpointError(
                    f"{checkpoint.directory}: the logits of layer {layer} are not finite or all zero: a norm or bias "
                    "is damaged; download the model again"
                )
            difference = np.abs(logits - expected).max(axis=-1) / np.abs(expected).max()  # by position
            if not difference.max() <= TOLERANCE and not difference.max() <= 3 * part.rounding(layer, ids, start):
                raise CheckpointError(_difference(checkpoint, spec, layer, start, difference))
            largest = max(largest, float(difference.max()))
        progress(number, len(layers), "preflight")
    return largest


def _layers(checkpoint: Checkpoint, spec: DecoderSpec) -> list[int]:
    """Return the first two layers, the last, and one of each kind of window, rotation and set of tensors."""
    kinds: dict[Any, int] = {}
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        shapes = tuple(
            sorted((n.removeprefix(prefix), t.shape) for n, t in checkpoint.tensors.items() if n.startswith(prefix))
        )
        kinds.setdefault((spec.windows[layer], spec.rotary[layer], shapes), layer)
    return sorted({0, min(1, spec.layers - 1), spec.layers - 1, *kinds.values()})


class _Part:
    """One layer of a model between some rows of its embedding and head, in transformers and as a graph."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = dict(checkpoint.config)
        if getattr(complete_config(config), "sliding_window", None):
            config["sliding_window"] = _WINDOW
        self._checkpoint = replace(checkpoint, config=config)
        self._spec = DecoderSpec.from_config(config)
        self.rows = min(_ROWS, self._spec.vocabulary)
        half = checkpoint.tensors[f"{EMBEDDING}.weight"].dtype == "F16"
        self._dtype = torch.float16 if half else torch.bfloat16  # both sides round to it
        self._format = WeightFormat.parse("fp16" if half else "bf16")

    def _tensor(self, name: str) -> torch.Tensor:
        is_table = name in (f"{EMBEDDING}.weight", f"{HEAD}.weight", f"{HEAD}.bias")
        rows = slice(0, self.rows) if is_table else None
        return self._checkpoint.tensor(name, rows).to(self._dtype)

    def rounding(self, layer: int, ids: torch.Tensor, start: int) -> float:
        """Return the float32 rounding error of transformers' own logits, relative to the largest logit."""
        ((single,), (double,)) = (self.transformers_logits(layer, ids, [start], d) for d in (torch.float, torch.double))
        return float(np.abs(single - double).max() / np.abs(double).max())

    @torch.no_grad()
    def transformers_logits(
        self, layer: int, ids: torch.Tensor, starts: Sequence[int], dtype: torch.dtype = torch.float
    ) -> list[NDArray[np.float32]]:
        """Return the logits [S, rows] of transformers' modules for ids [1, S], one array per start position."""
        model = empty_model(self._checkpoint)
        config, inner = model.config, model.model
        inner.layers = torch.nn.ModuleList([inner.layers[layer]])
        config.num_hidden_layers, config.use_cache = 1, False
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[layer]]
        for table in (inner.embed_tokens, model.lm_head):
            table.weight = torch.nn.Parameter(torch.empty(self.rows, self._spec.hidden, device="meta"))
        if model.lm_head.bias is not None:
            model.lm_head.bias = torch.nn.Parameter(torch.empty(self.rows, device="meta"))
        state: dict[str, torch.Tensor] = {}
        for name in model.state_dict():
            if name == f"{HEAD}.weight" and self._checkpoint.matrices.tied:
                state[name] = state[f"{EMBEDDING}.weight"]
            else:
                state[name] = self._tensor(name.replace("model.layers.0.", f"model.layers.{layer}.")).to(dtype)
        model.tie_weights = lambda *args, **options: None  # the rows are tied above
        model.load_state_dict(state, assign=True)
        positions = [torch.arange(start, start + ids.shape[1])[None] for start in starts]
        try:
            return [model(input_ids=ids, position_ids=at).logits[0].numpy() for at in positions]
        except Exception as error:  # a wrong config.json can fail anywhere in the modules
            raise CheckpointError(
                f"{self._checkpoint.directory}: transformers cannot run layer {layer} ({reason(error)}); correct "
                "config.json"
            ) from None

    def graph_logits(self, layer: int, ids: torch.Tensor, starts: Sequence[int]) -> list[NDArray[np.float32]]:
        """Return the logits of the layer's cpu graph in ONNX Runtime, shaped as those of `transformers_logits`."""
        import onnxruntime as ort

        spec = replace(
            self._spec,
            layers=1,
            vocabulary=self.rows,
            windows=(self._spec.windows[layer],),
            rotary=(self._spec.rotary[layer],),
        )
        prefix = f"model.layers.{layer}."
        matrices = [m.name for m in self._checkpoint.matrices.matrices if m.is_table or m.name.startswith(prefix)]
        codes = (
            (name.replace(prefix, "model.layers.0."), encode(self._tensor(f"{name}.weight"), self._format))
            for name in matrices
        )

        def small(name: str) -> torch.Tensor | None:
            name = name.replace("model.layers.0.", prefix)
            return self._tensor(name).float() if name in self._checkpoint.tensors else None

        form = GraphForm("cpu", "cpu.onnx", "float32")
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # else it decodes every weight
        options.enable_cpu_mem_arena = False
        length, zeros = ids.shape[1], np.zeros(1, np.int64)
        cache = np.zeros((1, spec.kv_heads, length, spec.head_dim), np.float32)
        place = Path(tempfile.gettempdir())
        with writing(place), scratch(place, "preflight") as directory:
            tied = self._checkpoint.matrices.tied
            write_graphs(directory, spec, codes, small, [form], [max(starts) + length], tied=tied)
            session = ort.InferenceSession(str(directory / form.file), options, providers=["CPUExecutionProvider"])
            feeds = {
                "input_ids": ids.numpy(),
                "write_index": zeros,
                "logits_index": np.arange(length)[None],
                "past_key_values.0.key": cache,
                "past_key_values.0.value": cache,
            }
            return [
                session.run(["logits"], {**feeds, "position_ids": np.arange(start, start + length)[None]})[0][0]
                for start in starts
            ]


def _difference(
    checkpoint: Checkpoint, spec: DecoderSpec, layer: int, start: int, difference: NDArray[np.float32]
) -> str:
    """Return the message about a difference; the positions where it occurs point to the likely cause."""
    first = int(np.flatnonzero(~(difference <= max(TOLERANCE, 0.05 * float(np.nanmax(difference)))))[0])
    if start:
        cause = "the rotary frequencies or their scaling (rope_parameters, rope_scaling)"
    elif first == 0:
        cause = "norms, activation, multipliers, biases or the head"
    elif first >= _WINDOW and getattr(complete_config(checkpoint.config), "sliding_window", None):
        cause = "the attention window (sliding_window, layer_types)"
    else:
        cause = "attention, its scale or the rotary positions"
    return (
        f"{checkpoint.directory}: the graph of layer {layer} differs from transformers' {spec.family} modules by "
        f"{difference.max():.1e} of the largest logit from token {start + first} on, allowed {TOLERANCE:g}; likely "
        f"cause: {cause}; correct config.json, or report this model"
    )
