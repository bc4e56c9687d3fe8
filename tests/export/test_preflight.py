"""The preflight finds every difference that is planted between a graph and transformers' modules, and names it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coatrt.errors import CheckpointError
from coatrt.export import preflight as module
from coatrt.export.preflight import compare, preflight
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.exportable import check_exportable
from coatrt.models.spec import DecoderSpec
from support.families import MODELS, save_model


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_what_transformers_computes(name: str, tmp_path: Path) -> None:
    save_model(tmp_path, name)
    checkpoint = Checkpoint.open(tmp_path)
    spec = DecoderSpec.from_config(checkpoint.config)
    check_exportable(checkpoint, spec)
    assert compare(checkpoint, spec) < 2e-6


def _rotated(spec: DecoderSpec, set_: int = 0, **changes: Any) -> dict[str, Any]:
    rotations = list(spec.rotations)
    rotations[set_] = replace(rotations[set_], **changes)
    return {"rotations": tuple(rotations)}


def _turned(spec: DecoderSpec, factor: float, set_: int = 0) -> dict[str, Any]:
    return _rotated(spec, set_, frequencies=tuple(value * factor for value in spec.rotations[set_].frequencies))


PLANTED: dict[str, tuple[str, Callable[[DecoderSpec], dict[str, Any]], str]] = {
    "epsilon": ("llama", lambda spec: {"epsilon": spec.epsilon + 0.01}, "norms"),
    "norm offset": ("gemma", lambda spec: {"norm_offset": 0.0}, "norms"),
    "layer norm": ("stablelm", lambda spec: {"layer_norm": False}, "norms"),
    "activation": ("gemma", lambda spec: {"activation": "gelu"}, "activation"),
    "another activation": ("llama", lambda spec: {"activation": "gelu"}, "activation"),
    "frequencies": ("llama", lambda spec: _turned(spec, 1.01), "rotary"),
    "the slowest frequency": (
        "llama",
        lambda spec: _rotated(
            spec, frequencies=(*spec.rotations[0].frequencies[:-1], spec.rotations[0].frequencies[-1] * 1.5)
        ),
        "rotary",
    ),
    "frequencies of yarn": ("qwen2-window-yarn", lambda spec: _turned(spec, 1.01), "rotary"),
    "factor on cosines": ("qwen2-window-yarn", lambda spec: _rotated(spec, scaling=1.0), "rotary"),
    "a rotated layer": ("smollm3", lambda spec: {"rotary": (0,) * spec.layers}, "layer 1"),
    "a window less": ("mistral-window", lambda spec: {"windows": (None,) * spec.layers}, "attention window"),
    "a window more": ("llama", lambda spec: {"windows": (None, None, 5)}, "layer 2"),
    "a window by one": ("mistral-window", lambda spec: {"windows": (6,) * spec.layers}, "attention window"),
    "layer types": ("qwen2-window-yarn", lambda spec: {"windows": spec.windows[::-1]}, "attention window"),
    "embedding multiplier": ("granite", lambda spec: {"embedding_multiplier": 1.0}, "multipliers"),
    "gemma's embedding": ("gemma", lambda spec: {"embedding_multiplier": 1.0}, "multipliers"),
    "residual multiplier": ("granite", lambda spec: {"residual_multiplier": 1.0}, "multipliers"),
    "attention multiplier": ("granite", lambda spec: {"attention_multiplier": 0.25}, "attention, its scale"),
    "the second base": ("gemma3_text", lambda spec: _turned(spec, 1.01, 1), "rotary"),
    "bases of the layers": ("gemma3_text", lambda spec: {"rotations": spec.rotations[::-1]}, "rotary"),
    "pairs of the rotation": ("glm4", lambda spec: {"interleaved": False}, "rotary"),
    "frequencies of long sequences": (
        "phi3-longrope-window",
        lambda spec: _rotated(spec, long_frequencies=spec.rotations[0].frequencies),
        "rotary",
    ),
    "soft cap of the attention": ("gemma2", lambda spec: {"attention_cap": 0.0}, "attention, its scale"),
    "soft cap of the logits": ("gemma2", lambda spec: {"logits_cap": 0.0}, "multipliers"),
    "parallel": ("cohere2", lambda spec: {"parallel": False}, "norms, activation"),
    "squared activation": ("nemotron", lambda spec: {"activation": "silu"}, "activation"),
    "logits divisor": ("granite", lambda spec: {"logits_divisor": 1.0}, "multipliers"),
}
"""What is planted: the model, the changed fields of its specification, and a word of the message."""


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_difference_is_found_and_named(planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, changes, said = PLANTED[planted]
    save_model(tmp_path, name)
    checkpoint = Checkpoint.open(tmp_path)
    read = DecoderSpec.from_config

    class Wrong(DecoderSpec):
        @classmethod
        def from_config(cls, values: Any) -> DecoderSpec:
            spec = read(values)
            return replace(spec, **changes(spec))

    spec = DecoderSpec.from_config(checkpoint.config)
    monkeypatch.setattr(module, "DecoderSpec", Wrong)
    with pytest.raises(CheckpointError, match=said) as caught:
        compare(checkpoint, spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", ["bias", "q_norm.weight", "layernorm.weight"])
def test_a_tensor_that_only_one_side_reads_is_found(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, {"bias": "llama-tied-biases", "q_norm.weight": "qwen3", "layernorm.weight": "llama"}[lost])
    checkpoint = Checkpoint.open(tmp_path)
    spec, write = DecoderSpec.from_config(checkpoint.config), module.write_graphs

    def forgetful(directory: Any, spec: Any, matrices: Any, small: Any, *rest: Any, **options: Any) -> None:
        def read(name: str) -> Any:
            tensor = small(name)
            if tensor is None or not name.endswith(lost):
                return tensor
            return None if lost != "layernorm.weight" else tensor * 1.01

        write(directory, spec, matrices, read, *rest, **options)

    monkeypatch.setattr(module, "write_graphs", forgetful)
    with pytest.raises(CheckpointError, match="differs from transformers'"):
        compare(checkpoint, spec)


def test_what_passed_is_remembered_until_the_model_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATRT_CACHE", str(tmp_path / "cache"))
    calls = []
    monkeypatch.setattr(module, "compare", lambda *arguments: calls.append(1))
    save_model(tmp_path / "model", "llama")
    preflight(Checkpoint.open(tmp_path / "model"))
    preflight(Checkpoint.open(tmp_path / "model"))
    assert len(calls) == 1
    save_model(tmp_path / "model", "llama", rms_norm_eps=0.1)
    preflight(Checkpoint.open(tmp_path / "model"))
    assert len(calls) == 2
    monkeypatch.setenv("COATRT_CACHE", "/proc/no/such/place")  # a cache that cannot be written costs time only
    preflight(Checkpoint.open(tmp_path / "model"))
    assert len(calls) == 3
