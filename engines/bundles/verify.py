"""Is a bundle what it says: hashes, versions, LoRA, and its numbers against torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coatrt.bundle import Bundle
from coatrt.devices.environment import versions
from coatrt.engines.bundles.graph_check import check_graph, check_matrices
from coatrt.engines.bundles.stored_weights import held_weights
from coatrt.engines.runtime.decoder import Decoder, LoraTensors
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.engines.runtime.options import Backend, RuntimeOptions
from coatrt.engines.runtime.ort import OrtDecoder
from coatrt.errors import BuildError, BundleError, CheckpointError, CoatError
from coatrt.system.extras import ExtraError, require

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TOLERANCE", "Verification", "verify"]

TOLERANCE = 1e-3
"""Largest difference of logits allowed, relative to the largest logit, with float32 activations."""

_FLOAT16_TOLERANCE = 3e-2
# What a matrix may be farther from the model's than the adapter measured: another machine's codes differ a little where
# they depend on second moments, and decoding in float16 rounds.
_ERROR_SLACK = (0.02, 1e-3)  # relative, absolute
_ON_A_GPU: tuple[Backend, ...] = ("cuda", "trt")
_STEPS = 16
_PROMPT = (1, 7, 3, 11, 5, 2, 9, 4)


@dataclass(frozen=True)
class Verification:
    """What was found; everything here holds, or `verify` had raised.

    Args:
        files: files whose SHA-256 was checked.
        signed: whether the key given has signed it; None where none was given.
        versions: package → (version that built the bundle, version here) where they differ.
        engines: one line per engine.
        lora_effect: largest change of a logit by the LoRA, relative to the largest logit.
        weights: matrices found as far from the model's weights as the adapter measured for their formats.
        torch_difference: largest |Δlogit| against torch with the bundle's own weights over prefill and decoding,
            relative; None where not compared.
        tolerance: what was allowed for it.
        note: why something was not compared.
        cuda: what the cuda form gave on this machine's GPU, or why it was not run; empty where the bundle has none.
        engine: the same of the bundle's engine for this GPU.
    """

    files: int
    signed: bool | None
    versions: dict[str, tuple[str, str]]
    engines: tuple[str, ...]
    lora_effect: float
    weights: int
    torch_difference: float | None
    tolerance: float
    note: str
    cuda: str
    engine: str

    def text(self) -> str:
        """Return the report as lines."""
        by = {True: "made by the key given", False: "not made by the key given", None: "not checked: give --key"}
        lines = [f"signature      {by[self.signed]}", f"files          {self.files} hashes hold"]
        lines += [f"engine         {line}" for line in self.engines]
        lines += [f"engine, here   {self.engine}"] if self.engine else []
        lines += [f"cuda.onnx      {self.cuda}"] if self.cuda else []
        lines += [f"version        {name}: built with {old}, here {new}" for name, (old, new) in self.versions.items()]
        lines.append("LoRA           equals what the hypernetwork emits here")
        lines.append(f"LoRA effect    largest change of a logit {self.lora_effect:.3g} of the largest logit")
        if self.torch_difference is None:
            lines.append(f"torch          not compared: {self.note}")
        else:
            lines.append(f"weights        {self.weights} matrices are as far from the model's as when it was trained")
            lines.append(
                f"torch          largest |Δlogit| {self.torch_difference:.2e} of the largest logit over prefill and "
                f"{_STEPS} decode steps (allowed {self.tolerance:g})"
            )
        return "\n".join(lines)


def verify(bundle: Bundle, *, model: str | Path | None = None, numbers: bool = True) -> Verification:
    """Check a bundle.

    Args:
        bundle: an opened bundle.
        model: the checkpoint, where it is not at the place the bundle remembers.
        numbers: compare with torch too; needs the checkpoint and time to load it.

    Raises:
        ExtraError: `model` is given, and torch or transformers is missing.
        BundleError: a file was altered, a graph reads a file that the manifest does not name for it, the errors of a
            matrix are missing, the LoRA is not what the hypernetwork emits, a weight is not its matrix in the
            configuration's format, or the numbers differ.
        CheckpointError: `model` is given and is not the bundle's model.
    """
    directory = bundle.directory
    files = bundle.check_all()
    for form in bundle.manifest["decoders"]:
        graph, io = bundle.decoder(form)
        check_graph(form, graph, io, bundle.contract)
        check_matrices(directory, bundle.model_matrices, io, bundle.contract)
    here = versions()
    changed = {
        name: (old, here[name])
        for name, old in bundle.manifest["versions"].items()
        if name in here and here[name] != old
    }
    contract, config = bundle.contract, bundle.config
    if config.hash != bundle.manifest["configuration"]["hash"]:
        raise BundleError(f"{directory}: configuration.json is not the configuration of the manifest; build it again")
    errors = bundle.manifest["configuration"]["errors"]
    if lacking := [name for name in bundle.model_matrices.names if name not in errors]:
        raise BundleError(
            f"{directory}: the manifest lacks the errors of {len(lacking)} matrices, like {lacking[0]}, by which "
            "weights are compared; build the bundle again"
        )
    lora = load_lora(bundle.path("lora.safetensors"), contract)
    emitted = Emitter.of(bundle).emit(config)
    for name, value in emitted.items():
        if not np.allclose(value, lora[name], rtol=0, atol=1e-5):
            raise BundleError(f"{directory}: {name} is not what the hypernetwork emits; build the bundle again")
    graph, io = bundle.decoder("cpu")
    decoder = OrtDecoder(graph, io, contract, RuntimeOptions(context=64, accuracy_level=0))
    prompt = [token % io.vocabulary for token in _PROMPT]
    tokens = _greedy(decoder, prompt)
    plain = _sound(_teacher_forced(decoder, prompt, tokens), f"{graph} without its LoRA")
    decoder.set_lora(lora)
    adapted = _sound(_teacher_forced(decoder, prompt, tokens), f"{graph} with its LoRA")
    effect = float(np.abs(adapted - plain).max() / np.abs(plain).max())
    if not effect > 0:
        raise BundleError(f"{directory}: the LoRA changes nothing; train the adapter, then build again")
    difference, weights, note = None, 0, "asked not to"
    tolerance = TOLERANCE if io.activations == "float32" else _FLOAT16_TOLERANCE
    if numbers:
        difference, weights, note = _against_torch(bundle, model, prompt, tokens, adapted, lora)
        if difference is not None and not (math.isfinite(difference) and difference <= tolerance):
            raise BundleError(
                f"{directory}: logits differ from torch by {difference:.2e} of the largest, allowed {tolerance:g}; "
                "report this with the bundle's manifest"
            )
    engines = _engine_lines(bundle, here)
    cuda, engine = (_on_the_gpu(bundle, backend, prompt, tokens, adapted, lora) for backend in _ON_A_GPU)
    return Verification(
        files, bundle.signed, changed, engines, effect, weights, difference, tolerance, note, cuda, engine
    )


def _on_the_gpu(
    bundle: Bundle,
    backend: Backend,
    prompt: Sequence[int],
    tokens: Sequence[int],
    logits: NDArray[np.float32],
    lora: LoraTensors,
) -> str:
    """Return how far a form of the decoder is from the cpu form on this machine's GPU, or why it was not run.

    Raises:
        BundleError: it is too far.
    """
    there, name = {
        "cuda": ("cuda" in bundle.manifest["decoders"], "cuda.onnx"),
        "trt": (bool(bundle.manifest["engines"]), "the engine"),
    }[backend]
    if not there:
        return ""
    try:
        decoder = load_decoder(bundle, backend=backend, context=64)
    except BuildError as error:
        return f"not run: {error}"
    if (needed := len(prompt) + len(tokens)) > decoder.capacity:
        return f"not run: it has {decoder.capacity} positions, the comparison needs {needed}"
    decoder.set_lora(lora)
    found = _sound(_teacher_forced(decoder, prompt, tokens), f"{name} with its LoRA")
    difference = float(np.abs(found - logits).max() / np.abs(logits).max())
    if not difference <= _FLOAT16_TOLERANCE:
        raise BundleError(
            f"{bundle.directory}: logits of {name} differ from those of cpu.onnx by {difference:.2e} of the "
            f"largest, allowed {_FLOAT16_TOLERANCE:g}; report this with the bundle's manifest"
        )
    return f"largest |Δlogit| to cpu.onnx {difference:.2e} of the largest logit (allowed {_FLOAT16_TOLERANCE:g})"


def _greedy(decoder: OrtDecoder, prompt: Sequence[int]) -> list[int]:
    tokens = [int(decoder.prefill([prompt])[0].argmax())]
    while len(tokens) < _STEPS:
        tokens.append(int(decoder.decode([tokens[-1]])[0].argmax()))
    return tokens


def _teacher_forced(decoder: Decoder, prompt: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
    """Return the logits after the prompt and after each token, float32 [1 + steps, V]."""
    return np.stack([decoder.prefill([prompt])[0], *(decoder.decode([token])[0] for token in tokens)])


def _sound(logits: NDArray[np.float32], what: str) -> NDArray[np.float32]:
    """Return logits, refused where nothing can be compared with them: not finite, or all zero."""
    if not (np.isfinite(logits).all() and logits.any()):
        kind = "all zero" if np.isfinite(logits).all() else "not finite (NaN or infinity)"
        raise BundleError(f"the logits of {what} are {kind}; build the bundle again, train again where that remains")
    return logits


def _against_torch(
    bundle: Bundle,
    model: str | Path | None,
    prompt: Sequence[int],
    tokens: Sequence[int],
    logits: NDArray[np.float32],
    lora: LoraTensors,
) -> tuple[float | None, int, str]:
    """Return the difference of logits, matrices whose error was compared, and why there is no comparison.

    torch gets the weights that the bundle holds: encoding the model again would give slightly other codes on another
    machine wherever they depend on second moments. Whether they are the model's is a comparison of its own.
    """
    try:
        require("the numerical comparison", "train")
    except ExtraError as error:
        if model is not None:  # asked for by name
            raise
        return None, 0, str(error)
    import torch

    from coatrt.evaluation.fake_quant import FakeQuantModel
    from coatrt.models.checkpoint import Checkpoint
    from coatrt.models.gguf_conversion import check_conversion
    from coatrt.models.sources import gguf_file
    from coatrt.quantization.code_cache import CodeStore

    facts = bundle.manifest["model"]
    if model is None and not Path(facts["source"]).exists():  # a name on the hub is asked for by the user alone
        return None, 0, f"the model {facts['source']} is not here; give it with --model"
    try:
        checkpoint = Checkpoint.open(model if model is not None else facts["source"])
    except CoatError as error:
        if model is not None:
            raise
        return None, 0, f"the model is not where it was ({error})"
    if checkpoint.fingerprint != facts["fingerprint"]:
        raise CheckpointError(
            f"{checkpoint.directory} has the fingerprint {checkpoint.fingerprint}, not {facts['fingerprint']}; "
            "give the bundle's model (--model)"
        )
    source = gguf_file(Path(model if model is not None else facts["source"]).expanduser())
    if source is not None:  # the file itself, not our conversion of it, is what the bundle claims to be
        check_conversion(source, checkpoint.directory)
    reference = FakeQuantModel(checkpoint, CodeStore(checkpoint))
    errors, compared = bundle.manifest["configuration"]["errors"], 0
    for name, held in held_weights(bundle.decoder("cpu")[0], bundle.model_matrices):
        weight = torch.from_numpy(held)
        if name in errors:
            _check_weight(bundle, name, checkpoint.tensor(f"{name}.weight").float(), weight, errors[name])
            compared += 1
        reference.set_weights([(name, weight)])
    reference.set_lora(bundle.contract, {name: torch.from_numpy(value.copy()) for name, value in lora.items()})
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *tokens]])
        expected = reference.logits(ids)[0, len(prompt) - 1 :].numpy()
    _sound(expected, "torch, with the weights and the LoRA of the bundle,")
    return float(np.abs(expected - logits).max() / np.abs(expected).max()), compared, ""


def _check_weight(bundle: Bundle, name: str, weight: "Tensor", held: "Tensor", expected: float) -> None:
    """Refuse a matrix that is farther from the model's, or nearer, than encoding left it."""
    found = float((weight - held).norm() / weight.norm().clamp(min=1e-30))
    if not math.isfinite(found):
        raise BundleError(f"{bundle.directory}: {name} holds numbers that are not finite; build the bundle again")
    relative, absolute = _ERROR_SLACK
    if not abs(found - expected) <= relative * expected + absolute:
        raise BundleError(
            f"{bundle.directory}: {name} differs from the model's by {found:.4f} of its norm, its encoding by "
            f"{expected:.4f}; build the bundle again"
        )


def _engine_lines(bundle: Bundle, here: dict[str, str]) -> tuple[str, ...]:
    lines = []
    for engine in bundle.manifest["engines"]:
        if not 0 < engine["bytes"] == bundle.path(engine["file"]).stat().st_size:
            raise BundleError(
                f"{bundle.path(engine['file'])} has {bundle.path(engine['file']).stat().st_size} bytes, its record "
                f"says {engine['bytes']}; build the bundle again"
            )
        version = here.get(engine["builder"])
        state = (
            "its version is installed here"
            if version == engine["version"]
            else f"needs {engine['version']}, here is {version or 'none'}"
        )
        targets = "/".join(f"SM{sm}" for sm in engine["sms"])
        lines.append(f"{engine['file']}: {targets}, {engine['bytes'] / 1e6:.1f} MB, {engine['builder']} ({state})")
    return tuple(lines)
