"""The demo's measurements: held-out losses of every GPU's configuration, with no LoRA, its own and the neighbours'."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from demo_table import FP16, Losses, perplexity, result_row

import coatrt

__all__ = ["Measurements", "measure", "write"]


def write(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class Measurements:
    """Held-out losses, kept in a file as they are measured: an interrupted demo goes on after the last one.

    Args:
        path: the file.
        adapter: gives the model.
        data: what is measured on.
    """

    def __init__(self, path: Path, adapter: coatrt.Adapter, data: coatrt.TaskData) -> None:
        self._path, self._adapter, self._data = path, adapter, data
        self._evaluator: coatrt.Evaluator | None = None
        self._kept: dict[str, list[float]] = {}
        self.new = 0
        if path.is_file():
            try:
                self._kept = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise coatrt.CoatError(f"{path} is damaged; remove it and run again") from error

    def losses(self, config: coatrt.QuantConfig, bundle: coatrt.Bundle | None = None) -> Losses:
        """Return nats per token of each held-out block for a configuration, with the LoRA of a bundle or without."""
        lora = "" if bundle is None else bundle.manifest["files"]["lora.safetensors"]["sha256"]
        key = f"{self._data.digest} {config.hash} {lora}"
        if key not in self._kept:
            self._evaluator = self._evaluator or coatrt.Evaluator(self._adapter)
            tensors = None
            if bundle is not None:
                tensors = coatrt.load_lora(bundle.path("lora.safetensors"), bundle.contract)
            self.new += 1
            self._kept[key] = self._evaluator.example_losses(config, self._data, tensors).tolist()
            write(self._path, json.dumps(self._kept))
        return np.array(self._kept[key])


def measure(
    measurements: Measurements, results: list[coatrt.BundleResult], progress: Any
) -> tuple[list[dict[str, Any]], float]:
    """Return the result, one row per GPU, and the perplexity of the model in fp16."""
    bundles = {result.target.device.id: result.bundle for result in results}
    total, done = 1 + len(bundles) * (1 + len(bundles)), 0

    def losses(what: str, config: coatrt.QuantConfig, lora: coatrt.Bundle | None = None) -> Losses:
        nonlocal done
        progress(done, total, "perplexities", what)
        found = measurements.losses(config, lora)
        done += 1
        return found

    model = results[0].bundle.model_matrices
    base = losses(FP16, coatrt.QuantConfig.uniform(model, "fp16"))
    rows = []
    for name, bundle in bundles.items():
        config, bits = bundle.config, {}
        for matrix in model.targets:
            value = config[matrix.name].effective(matrix.K).bits_per_weight(matrix.K)
            bits.setdefault(matrix.kind, []).append(round(value, 3))
        facts = {
            "device": name,
            "bits": config.average_bits(model),
            "formats": dict(config.counts),
            "engine_bytes": bundle.manifest["engines"][0]["bytes"],
            "ideal_bytes": config.nbytes(model) + model.other_bytes,
            "bits_per_matrix": bits,
        }
        without, own = losses(f"{name}, no LoRA", config), losses(f"{name}, own LoRA", config, bundle)
        others = {
            other: losses(f"{name}, LoRA of {other}", config, bundles[other]) for other in bundles if other != name
        }
        rows.append(result_row(facts, base, without, own, others))
    return rows, perplexity(base)
