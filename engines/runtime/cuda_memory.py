"""The GPU memory of a decoder: which weights stay packed, and whether all of it fits."""

from collections import Counter
from dataclasses import dataclass

from coatrt.configs.config import QuantConfig
from coatrt.engines.runtime.cuda_driver import CudaDriver
from coatrt.errors import BuildError
from coatrt.models.matrices import ModelMatrices

__all__ = ["DeviceWeights", "check_memory", "device_weights"]

_PACKED = ("int4", "int8")  # ONNX Runtime fuses these into MatMulNBits
_SIXTEEN_BITS = ("fp16", "bf16")
_WORKSPACE = 256 << 20  # for the libraries and the activations of a prefill


@dataclass(frozen=True)
class DeviceWeights:
    """The weights of a configuration on the GPU.

    Args:
        nbytes: bytes of all weights.
        note: one line about the weights that are decoded to float16 when the graph loads; empty if there are none.
    """

    nbytes: int
    note: str


def device_weights(config: QuantConfig, model: ModelMatrices) -> DeviceWeights:
    """Return the size of a configuration's weights on the GPU; ONNX Runtime keeps only int4 and int8 packed there."""
    total, decoded_bytes, kinds = model.other_bytes, 0, Counter[str]()
    for matrix in model.matrices:
        fmt, wide = config[matrix.name], 2 * matrix.N * matrix.K
        total += fmt.nbytes(matrix.N, matrix.K) if fmt.kind not in _SIXTEEN_BITS else wide
        multiplied = matrix in model.multiplied
        if matrix.name == model.matrices[0].name and multiplied:  # the tied head is a second reader
            total += fmt.nbytes(matrix.N, matrix.K) if fmt.kind in _PACKED else wide
        elif multiplied and fmt.kind not in (*_PACKED, *_SIXTEEN_BITS):
            total += wide - fmt.nbytes(matrix.N, matrix.K)
        if multiplied and fmt.kind not in (*_PACKED, *_SIXTEEN_BITS):
            kinds[fmt.kind] += 1
            decoded_bytes += wide
    if not kinds:
        return DeviceWeights(total, "")
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    note = (
        f"ONNX Runtime keeps only int4 and int8 packed on the GPU: {sum(kinds.values())} matrices ({counts}) are "
        f"decoded to float16 and take {decoded_bytes / 1e9:.2f} GB"
    )
    return DeviceWeights(total, note)


def check_memory(
    driver: CudaDriver, weights: int, caches: int, other: int, slots: int, batch: int, advice: str
) -> None:
    """Refuse a decoder that does not fit into the free GPU memory.

    Args:
        driver: the GPU.
        weights: bytes of the weights.
        caches: bytes of the KV caches.
        other: bytes of LoRA and logits.
        slots: cache slots per sequence.
        batch: sequences per step.
        advice: what the user can do, for the message.

    Raises:
        BuildError: the GPU has fewer bytes free than the decoder needs.
    """
    free, total = driver.memory()
    needed = weights + caches + other + _WORKSPACE
    if needed > free:
        raise BuildError(
            f"not enough GPU memory: {needed / 1e9:.2f} GB needed ({weights / 1e9:.2f} GB of weights, "
            f"{caches / 1e9:.2f} GB of caches for {batch} × {slots} positions), {free / 1e9:.2f} of "
            f"{total / 1e9:.2f} GB free; {advice}"
        )
