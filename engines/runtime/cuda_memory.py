"""What a decoder takes on a GPU: which weights stay packed there, and whether there is room."""

from collections import Counter
from dataclasses import dataclass

from coatrt.configs.config import QuantConfig
from coatrt.engines.runtime.cuda_driver import CudaDriver
from coatrt.errors import BuildError
from coatrt.models.matrices import ModelMatrices

__all__ = ["DeviceWeights", "check_memory", "device_weights"]

_PACKED = ("int4", "int8")  # ONNX Runtime fuses these into MatMulNBits
_SIXTEEN_BITS = ("fp16", "bf16")
_WORKSPACE = 256 << 20  # libraries, and what a prefill takes beside the caches


@dataclass(frozen=True)
class DeviceWeights:
    """The weights of a configuration on the GPU.

    Args:
        nbytes: all of them.
        note: one line on those that are decoded to float16 when the graph loads; empty where none are.
    """

    nbytes: int
    note: str


def device_weights(config: QuantConfig, model: ModelMatrices) -> DeviceWeights:
    """Return what the weights of a configuration take: ONNX Runtime has packed products for int4 and int8 alone."""
    total, decoded, kinds = model.other_bytes, 0, Counter[str]()
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
            decoded += wide
    if not kinds:
        return DeviceWeights(total, "")
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    note = (
        f"ONNX Runtime multiplies only int4 and int8 packed: {sum(kinds.values())} matrices ({listed}) are decoded to "
        f"float16 on the GPU and take {decoded / 1e9:.2f} GB"
    )
    return DeviceWeights(total, note)


def check_memory(
    driver: CudaDriver, weights: int, caches: int, other: int, slots: int, batch: int, advice: str
) -> None:
    """Refuse a decoder that cannot fit.

    Args:
        driver: the GPU.
        weights: bytes of its weights.
        caches: bytes of its caches.
        other: bytes of LoRA and logits.
        slots: of the caches.
        batch: sequences.
        advice: what to do.

    Raises:
        BuildError: the GPU has not as many bytes free.
    """
    free, total = driver.memory()
    needed = weights + caches + other + _WORKSPACE
    if needed > free:
        raise BuildError(
            f"not enough memory on the GPU: {needed / 1e9:.2f} GB are needed ({weights / 1e9:.2f} GB of weights, "
            f"{caches / 1e9:.2f} GB of caches for {batch} × {slots} positions) and {free / 1e9:.2f} of "
            f"{total / 1e9:.2f} GB are free; {advice}"
        )
