"""Verifies a bundle: hashes, graphs, versions, LoRA, and its numbers against torch."""

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
from coatrt.engines.bundles.stored_weights import stored_weights
from coatrt.engines.runtime.decoder import Decoder, LoraTensors
from coatrt.engines.runtime.emitter import Emitter
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.engines.runtime.options import Backend, RuntimeOptions
from coatrt.engines.runtime.ort import OrtDecoder
from coatrt.errors import BuildError, BundleError, CheckpointError, CoatError
from coatrt.system.extras import ExtraError, require
from coatrt.system.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TOLERANCE", "Verification", "verify"]

TOLERANCE = 1e-3
"""Largest difference of logits allowed with float32 activations, relative to the largest logit."""

_FLOAT16_TOLERANCE = 3e-2
# How much a matrix's quantization error may differ from the adapter's measurement: codes that depend on second moments
# differ slightly between machines, and decoding in float16 rounds.
_ERROR_SLACK = (0.02, 1e-3)  # relative, absolute
_ON_A_GPU: tuple[Backend, ...] = ("cuda", "trt")
_STEPS = 16
_PROMPT = (1, 7, 3, 11, 5, 2, 9, 4)


@dataclass(frozen=True)
class Verification:
    """The report on a bundle that passed; a bundle that fails makes `verify` raise.

    Args:
        files: number of files whose SHA-256 was checked.
        signed: whether the given key signed it; None without a key.
        versions: package → (version that built the bundle, version installed here), for those that differ.
        engines: one line per engine.
        lora_effect: largest change of a logit by the LoRA, relative to the largest logit.
        weights: number of matrices whose quantization error is the one that the adapter measured.
        torch_difference: largest |Δlogit| against torch with the bundle's own weights over prefill and decoding,
            relative to the largest logit; None if not compared.
        tolerance: the largest `torch_difference` allowed.
        note: why the comparison with torch was skipped.
        cuda: result of the cuda form on this machine's GPU, or why it was not run; empty if the bundle has none.
        engine: the same for the bundle's engine.
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
        signature = {True: "made by the key given", False: "not made by the key given", None: "not checked: give --key"}
        lines = [f"signature      {signature[self.signed]}", f"files          {self.files} hashes match"]
        lines += [f"engine         {line}" for line in self.engines]
        lines += [f"engine, here   {self.engine}"] if self.engine else []
        lines += [f"cuda.onnx      {self.cuda}"] if self.cuda else []
        lines += [f"version        {name}: built with {old}, here {new}" for name, (old, new) in self.versions.items()]
        lines.append("LoRA           equals the one that the hypernetwork emits here")
        lines.append(f"LoRA effect    largest change of a logit {self.lora_effect:.3g} of the largest logit")
        if self.torch_difference is None:
            lines.append(f"torch          not compared: {self.note}")
        else:
            lines.append(f"weights        {self.weights} matrices have the quantization error measured at training")
            lines.append(
                f"torch          largest |Δlogit| {self.torch_difference:.2e} of the largest logit over prefill and "
                f"{_STEPS} decode steps (allowed {self.tolerance:g})"
            )
        return "\n".join(lines)


def verify(
    bundle: Bundle, *, model: str | Path | None = None, numbers: bool = True, progress: Progress = silent
) -> Verification:
    """Check a bundle.

    Args:
        bundle: an opened bundle.
        model: the checkpoint; by default its path when the bundle was built.
        numbers: compare with torch too; needs the checkpoint and time to load it.
        progress: called as each check begins, and after each matrix.

    Raises:
        ExtraError: `model` is given, and torch or transformers is missing.
        BundleError: a file was altered, a graph reads a file that the manifest does not name for it, the quantization
            error of a matrix is missing in the manifest, the LoRA is not the one the hypernetwork emits, a weight is
            not its matrix in the configuration's format, or the logits differ.
        CheckpointError: `model` is not the bundle's model, or cannot be read.
    """
    directory = bundle.directory
    progress(0, 1, "hashes")
    files = bundle.check_all()
    progress(0, 1, "graphs")
    for form in bundle.manifest["decoders"]:
        graph, io = bundle.decoder(form)
        check_graph(form, graph, io, bundle.contract)
        check_matrices(directory, bundle.model_matrices, io, bundle.contract)
    installed = versions()
    differences = {
        name: (old, installed[name])
        for name, old in bundle.manifest["versions"].items()
        if name in installed and installed[name] != old
    }
    contract, config = bundle.contract, bundle.config
    if config.hash != bundle.manifest["configuration"]["hash"]:
        raise BundleError(f"{directory}: configuration.json is not the configuration of the manifest; build it again")
    errors = bundle.manifest["configuration"]["errors"]
    if missing := [name for name in bundle.model_matrices.names if name not in errors]:
        names = missing[0] if len(missing) == 1 else f"{missing[0]} and {len(missing) - 1} more matrices"
        raise BundleError(
            f"{directory}: the manifest lacks the quantization error of {names}, which verify compares; build the "
            "bundle again"
        )
    progress(0, 1, "LoRA")
    lora = load_lora(bundle.path("lora.safetensors"), contract)
    emission = Emitter.of(bundle).emit(config)
    for name, value in emission.items():
        if not np.allclose(value, lora[name], rtol=0, atol=1e-5):
            raise BundleError(f"{directory}: {name} differs from the hypernetwork's output; build the bundle again")
    progress(0, 1, "decoding on the CPU")
    graph, io = bundle.decoder("cpu")
    decoder = OrtDecoder(graph, io, contract, RuntimeOptions(context=64, accuracy_level=0))
    prompt = [token % io.vocabulary for token in _PROMPT]
    tokens = _greedy(decoder, prompt)
    base_logits = _finite(_teacher_forced(decoder, prompt, tokens), f"{graph} without its LoRA")
    decoder.set_lora(lora)
    lora_logits = _finite(_teacher_forced(decoder, prompt, tokens), f"{graph} with its LoRA")
    effect = float(np.abs(lora_logits - base_logits).max() / np.abs(base_logits).max())
    if not effect > 0:
        raise BundleError(f"{directory}: the LoRA changes nothing; train the adapter, then build again")
    difference, weights, note = None, 0, "skipped on request"
    tolerance = TOLERANCE if io.activations == "float32" else _FLOAT16_TOLERANCE
    if numbers:
        difference, weights, note = _against_torch(bundle, model, prompt, tokens, lora_logits, lora, progress)
        if difference is not None and not (math.isfinite(difference) and difference <= tolerance):
            raise BundleError(
                f"{directory}: logits differ from torch by {difference:.2e} of the largest, allowed {tolerance:g}; "
                "report this with the bundle's manifest"
            )
    progress(0, 1, "decoding on the GPU")
    engines = _engine_lines(bundle, installed)
    cuda, engine = (_on_the_gpu(bundle, backend, prompt, tokens, lora_logits, lora) for backend in _ON_A_GPU)
    return Verification(
        files, bundle.signed, differences, engines, effect, weights, difference, tolerance, note, cuda, engine
    )


def _on_the_gpu(
    bundle: Bundle,
    backend: Backend,
    prompt: Sequence[int],
    tokens: Sequence[int],
    logits: NDArray[np.float32],
    lora: LoraTensors,
) -> str:
    """Run a GPU backend and return its difference from the cpu form, or why it was not run.

    Raises:
        BundleError: the logits differ too much.
    """
    exists, name = {
        "cuda": ("cuda" in bundle.manifest["decoders"], "cuda.onnx"),
        "trt": (bool(bundle.manifest["engines"]), "the engine"),
    }[backend]
    if not exists:
        return ""
    try:
        decoder = load_decoder(bundle, backend=backend, context=64)
    except BuildError as error:
        return f"not run: {error}"
    if (positions := len(prompt) + len(tokens)) > decoder.capacity:
        return f"not run: it has {decoder.capacity} positions, the comparison needs {positions}"
    decoder.set_lora(lora)
    gpu_logits = _finite(_teacher_forced(decoder, prompt, tokens), f"{name} with its LoRA")
    difference = float(np.abs(gpu_logits - logits).max() / np.abs(logits).max())
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


def _finite(logits: NDArray[np.float32], what: str) -> NDArray[np.float32]:
    """Return logits that can be compared; refuse those that are not finite or all zero."""
    if not (np.isfinite(logits).all() and logits.any()):
        kind = "all zero" if np.isfinite(logits).all() else "not finite (NaN or infinity)"
        raise BundleError(
            f"the logits of {what} are {kind}; build the bundle again; if that does not help, train again"
        )
    return logits


def _against_torch(
    bundle: Bundle,
    model: str | Path | None,
    prompt: Sequence[int],
    tokens: Sequence[int],
    logits: NDArray[np.float32],
    lora: LoraTensors,
    progress: Progress,
) -> tuple[float | None, int, str]:
    """Return the difference of logits, the number of matrices compared, and why there is no comparison.

    torch gets the weights stored in the bundle: encoding the model again on another machine would give slightly
    different codes wherever they depend on second moments. `_check_weight` compares the weights with the model's.
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
    from coatrt.models.sources import check_source
    from coatrt.quantization.code_cache import CodeStore

    facts = bundle.manifest["model"]
    if model is None and not Path(facts["source"]).exists():  # never download a hub model unless the user names it
        return None, 0, f"no model at {facts['source']}; give it with --model"
    try:
        checkpoint = Checkpoint.open(model if model is not None else facts["source"])
    except CoatError as error:
        if model is not None:
            raise
        return None, 0, f"the model cannot be read ({error})"
    if checkpoint.fingerprint != facts["fingerprint"]:
        raise CheckpointError(
            f"not the bundle's model: {checkpoint.directory} has fingerprint {checkpoint.fingerprint}, not "
            f"{facts['fingerprint']}; give the bundle's model (--model)"
        )
    # A bundle is built from the model itself, not from a cached conversion of it.
    check_source(model if model is not None else facts["source"], checkpoint.directory)
    progress(0, 1, "loading the model")
    reference = FakeQuantModel(checkpoint, CodeStore(checkpoint))
    errors, count = bundle.manifest["configuration"]["errors"], 0
    for name, values in stored_weights(bundle.decoder("cpu")[0], bundle.model_matrices):
        weight = torch.from_numpy(values)
        if name in errors:
            _check_weight(bundle, name, checkpoint.tensor(f"{name}.weight").float(), weight, errors[name])
            count += 1
        reference.set_weights([(name, weight)])
        progress(count, len(errors), "weights")
    reference.set_lora(bundle.contract, {name: torch.from_numpy(value.copy()) for name, value in lora.items()})
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *tokens]])
        expected = reference.logits(ids)[0, len(prompt) - 1 :].numpy()
    _finite(expected, "torch, with the weights and the LoRA of the bundle,")
    return float(np.abs(expected - logits).max() / np.abs(expected).max()), count, ""


def _check_weight(bundle: Bundle, name: str, weight: "Tensor", decoded: "Tensor", expected: float) -> None:
    """Refuse a matrix whose relative error |W − Q(W)| / |W| is not the one that the adapter measured."""
    error = float((weight - decoded).norm() / weight.norm().clamp(min=1e-30))
    if not math.isfinite(error):
        raise BundleError(f"{bundle.directory}: {name} has values that are not finite; build the bundle again")
    relative, absolute = _ERROR_SLACK
    if not abs(error - expected) <= relative * expected + absolute:
        raise BundleError(
            f"{bundle.directory}: {name} has a quantization error of {error:.4f} of its norm, the adapter measured "
            f"{expected:.4f}; build the bundle again"
        )


def _engine_lines(bundle: Bundle, installed: dict[str, str]) -> tuple[str, ...]:
    lines = []
    for engine in bundle.manifest["engines"]:
        if not 0 < engine["bytes"] == bundle.path(engine["file"]).stat().st_size:
            raise BundleError(
                f"{bundle.path(engine['file'])} has {bundle.path(engine['file']).stat().st_size} bytes, its record "
                f"says {engine['bytes']}; build the bundle again"
            )
        version = installed.get(engine["builder"])
        state = (
            "its version is installed here"
            if version == engine["version"]
            else f"needs {engine['version']}, installed is {version or 'none'}"
        )
        targets = "/".join(f"SM{sm}" for sm in engine["sms"])
        lines.append(f"{engine['file']}: {targets}, {engine['bytes'] / 1e6:.1f} MB, {engine['builder']} ({state})")
    return tuple(lines)
