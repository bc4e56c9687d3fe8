"""Layer by layer: each matrix is encoded for what it reads once everything before it is quantized in the same format.

Its outputs are to be those of full precision nevertheless, and where they are added to the residual stream, the sum is
(GPTAQ, arXiv 2504.02692, and QEP, arXiv 2504.09629, with the residual stream). So errors do not add up from layer to
layer.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from coatrt.models.matrices import ModelMatrices
from coatrt.quantization.codec import QuantizedMatrix, decode, encode
from coatrt.quantization.float32 import full_float32
from coatrt.quantization.gptq import DAMPING
from coatrt.quantization.layer_streams import LayerStreams
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.progress import Progress

__all__ = ["encode_layers"]

_STRENGTH = 1.0
Read = Callable[[str], QuantizedMatrix | None]


def encode_layers(
    streams: LayerStreams,
    matrices: ModelMatrices,
    weight: Callable[[str], Tensor],
    fmt: WeightFormat,
    read: Read,
    progress: Progress,
) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Yield every linear matrix encoded, in network order.

    Args:
        streams: the model before its first layer.
        matrices: the model's matrices.
        weight: name → W [N, K] on the model's device.
        fmt: the format of all of them, each with the block that fits its K.
        read: name → a matrix that an earlier run has encoded, or None; those are not encoded again.
        progress: called after each layer.
    """
    layers: dict[int, list[Sequence[str]]] = {}
    for group in matrices.groups:
        if (layer := matrices.by_name[group[0]].layer) >= 0:
            layers.setdefault(layer, []).append(group)
    for layer, groups in sorted(layers.items()):
        assert layer == streams.place
        for group in groups:
            known = [read(name) for name in group]
            parts = [part for part in known if part is not None]
            if len(parts) < len(group):
                weights = [weight(name) for name in group]
                parts = _encode_group(streams, _local(group[0]), torch.cat(weights), fmt).split(list(map(len, weights)))
            for name, part in zip(group, parts, strict=True):
                streams.set_weight(_local(name), decode(part))
                yield name, part
        streams.advance()
        progress(layer + 1, len(layers), f"encoding layers in {fmt}")


def _local(name: str) -> str:
    """Return the name within its layer: model.layers.3.mlp.up_proj → mlp.up_proj."""
    return name.split(".", 3)[3]


def _encode_group(streams: LayerStreams, name: str, weight: Tensor, fmt: WeightFormat) -> QuantizedMatrix:
    """Encode the matrices that read one input for what they read and should give.

    With x in full precision, x̃ as quantized so far and d what the residual stream lacks, the best weight in full
    precision is W + E[(W(x − x̃) + d) x̃ᵀ] H̃⁻¹ with H̃ = E[x̃ x̃ᵀ]. What few tokens say about K inputs is shrunk as in
    `coatrt.quantization.gptq.shrink`.

    Args:
        streams: the model at this layer.
        name: the first of them, by its name within the layer.
        weight: W, [N, K]: all of them.
        fmt: the format.
    """
    N, K = weight.shape
    moment, shift = torch.zeros(K, K, device=weight.device), torch.zeros(K, K, device=weight.device)
    missing = torch.zeros(N, K, device=weight.device)
    share = 1 / streams.tokens
    with full_float32():
        for x, near, lack in streams.inputs(name):
            moment.addmm_(near.T, near, alpha=share)
            shift.addmm_((x - near).T, near, alpha=share)
            if lack is not None:
                missing.addmm_(lack.T, near, alpha=share)
        missing.addmm_(weight.float(), shift)
        damped = moment.clone()
        damped.diagonal().add_(DAMPING * float(moment.diagonal().mean()) + 1e-30)
        correction = torch.cholesky_solve(missing.T, torch.linalg.cholesky(damped)).T
    target = weight.float() + correction * (_STRENGTH * streams.tokens / (streams.tokens + K))
    return encode(target, fmt, "refined", moment, streams.tokens)
