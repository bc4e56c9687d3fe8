"""Encoding with error feedback on the GPU: seconds and memory for 7B shapes, and how its codes differ from the CPU's.

It imports coatrt from its repository and needs torch and numpy only.
"""

import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from rows import arguments, run

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
sys.path.append(str(ROOT / "tests"))
try:
    import lazy_loader  # noqa: F401 - of coatrt's front door, which is not needed here
except ImportError:
    nothing: Any = types.ModuleType("lazy_loader")
    nothing.attach_stub = lambda *_: (None, None, [])
    sys.modules["lazy_loader"] = nothing

from coatrt.quantization import feedback_blocks  # noqa: E402
from coatrt.quantization.codec import QuantizedMatrix, decode_scales, encode  # noqa: E402
from coatrt.quantization.gptq import InverseFactors, feedback_codes  # noqa: E402
from support.feedback_check import output_error, ties_of  # noqa: E402

FORMATS = ("nf3-g64", "int4-g64", "nvfp4", "nf2-g64", "fp8", "int8")
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (32000, 4096))
"""N and K: q and o; gate and up; down; k and v; the head of 32,000 tokens."""
COUNTS = {(4096, 4096): 64, (14336, 4096): 64, (4096, 14336): 32, (1024, 4096): 64, (32000, 4096): 1}
FACTORS = {4096: 97, 14336: 32}
"""A model of 7B: 32 layers with the groups q|k|v, o, gate|up and down, and a head; K → how many factors."""
TINY = {4096: 128, 14336: 192, 1024: 64, 32000: 160}
CPU = torch.device("cpu")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], device: torch.device, samples: int = 3) -> float:
    """Return the median of some runs after a warm-up run."""
    found = []
    for _ in range(samples + 1):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def moment_of(K: int, device: torch.device) -> torch.Tensor:
    """Return the second moment [K, K] of 4 K correlated inputs of unlike energy."""
    generator = torch.Generator(device).manual_seed(K)
    energy = torch.randn(K, generator=generator, device=device).mul_(0.7).exp_()
    mix = torch.randn(K // 8, K, generator=generator, device=device) / (K // 8) ** 0.5
    moment = torch.zeros(K, K, device=device)
    for _ in range(4):
        x = torch.randn(K, K, generator=generator, device=device)
        x += torch.randn(K, K // 8, generator=generator, device=device) @ mix
        x *= energy
        moment.addmm_(x.t(), x, alpha=1 / (4 * K))
    return moment


@lru_cache(maxsize=1)
def weight_of(N: int, K: int) -> torch.Tensor:
    """Return a random weight in bfloat16, on the CPU as a checkpoint's is."""
    return (torch.randn(N, K, generator=torch.Generator().manual_seed(N + K)) * 0.02).bfloat16()


class Moments:
    """The moment of the last K and its factor.

    Args:
        device: device of both.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._K = device, 0

    def get(self, K: int) -> tuple[torch.Tensor, InverseFactors]:
        """Return the moment [K, K], and its factor, made already."""
        if self._K != K:
            self.moment = self.factors = None  # type: ignore[assignment]
            self.moment, self.factors, self._K = moment_of(K, self._device), InverseFactors(), K
        self.factors.get(self.moment, 4 * K)
        return self.moment, self.factors


def timed(N: int, K: int, text: str, moments: Moments, device: torch.device) -> dict[str, Any]:
    """Return the seconds of an encoding, on the GPU alone and with the copies to and fro, and its peak memory."""
    moment, factors = moments.get(K)
    stored = weight_of(N, K)

    def there(weight: torch.Tensor) -> QuantizedMatrix:
        return encode(weight, text, "feedback", moment, 4 * K, factors)

    near = stored.to(device)
    found: dict[str, Any] = {"seconds": round(seconds(partial(there, near), device), 5)}
    if device.type == "cuda":
        found["held_gb"] = round(torch.cuda.memory_allocated() / 1e9, 3)
        torch.cuda.reset_peak_memory_stats()
        there(near)
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    found["with_copies"] = round(seconds(lambda: there(stored.to(device)).to(CPU), device), 5)
    return found


def factored(K: int, moments: Moments, device: torch.device) -> dict[str, Any]:
    """Return the seconds of a group's factor and of copying its moment to the device."""
    moment, _ = moments.get(K)
    stored = moment.cpu()
    return {
        "seconds": round(seconds(lambda: InverseFactors().get(moment, 4 * K), device, 2), 4),
        "copy": round(seconds(lambda: stored.to(device), device, 2), 4),
    }


@lru_cache(maxsize=1)
def both(K: int, device: torch.device) -> tuple[torch.Tensor, InverseFactors, torch.Tensor, InverseFactors]:
    """Return one moment and its factor on the CPU and on the device, each factor computed there."""
    moment, ours = Moments(CPU).get(K)
    return moment, ours, moment.to(device, copy=True), InverseFactors()


def compared(N: int, K: int, text: str, device: torch.device) -> dict[str, Any]:
    """Return how the codes of the device and of the CPU differ, and what that does to the output error."""
    moment, ours, there, theirs = both(K, device)
    weight = weight_of(N, K).float()
    near = weight.to(device)
    mine = encode(weight, text, "feedback", moment, 4 * K, ours)
    other = encode(near, text, "feedback", there, 4 * K, theirs)
    back = other.to(CPU)
    differ = mine.codes.view(torch.uint8) != back.codes.view(torch.uint8)
    scales = decode_scales(mine) != decode_scales(back)
    one, two = output_error(near, mine.to(device), there), output_error(near, other, there)
    ties = {
        "cpu": ties_of(near, mine.to(device), *(part.to(device) for part in ours.get(moment, 4 * K))),
        "device": ties_of(near, other, *theirs.get(there, 4 * K)),
    }
    return {
        "codes": differ.numel(),
        "differ": round(float(differ.double().mean()), 8),
        "rows_that_differ": round(float(differ.any(1).double().mean()), 6),
        "scales_that_differ": int(scales.sum()),
        "rows_whose_scales_differ": int(scales.any(1).sum()),
        "differ_in_other_rows": round(float(differ[~scales.any(1)].double().mean()), 8),
        "output_error": two,
        "relative_difference": abs(one - two) / one,
        "near_ties": {name: found.count for name, found in ties.items()},
        "worst_tie_steps": {name: found.worst for name, found in ties.items()},
    }


def parts(N: int, K: int, text: str, moments: Moments, device: torch.device) -> dict[str, Any]:
    """Return the seconds of scales, of feedback by the kernel and by torch's loop, and whether these two agree."""
    moment, factors = moments.get(K)
    weight = weight_of(N, K).to(device)
    order, factor = factors.get(moment, 4 * K)
    matrix = encode(weight, text, "weighted", moment)
    scales, block = decode_scales(matrix), matrix.format.block or K

    def feedback(step: Any = None) -> torch.Tensor:
        return feedback_codes(weight.float(), scales, block, matrix.grid, order, factor, step)

    fast = feedback().view(torch.uint8)
    slow = feedback(feedback_blocks.torch_step).view(torch.uint8)
    return {
        "step": feedback_blocks.step_for(device).__module__.rpartition(".")[2],
        "scales": round(seconds(lambda: encode(weight, text, "weighted", moment), device), 5),
        "feedback": round(seconds(feedback, device), 5),
        "feedback_torch": round(seconds(lambda: feedback(feedback_blocks.torch_step), device, 1), 4),
        "differ": round(float((fast != slow).double().mean()), 8),
    }


def whole_model(path: Path, shape: Callable[[int], int]) -> dict[str, Any]:
    """Return minutes to encode a 7B model in all formats, from the rows that are measured."""
    rows = {row["key"]: row for row in map(json.loads, path.read_text().splitlines())}
    found: dict[str, Any] = {"formats": FORMATS, "of_seconds": {}}
    for text in FORMATS:
        times = {key: rows[f"encoding/{shape(key[0])}x{shape(key[1])}/{text}"]["with_copies"] for key in COUNTS}
        found["of_seconds"][text] = round(sum(COUNTS[key] * value for key, value in times.items()), 2)
    factors = {K: rows[f"encoding/factor/{shape(K)}"] for K in FACTORS}
    found["factors_s"] = round(sum(count * factors[K]["seconds"] for K, count in FACTORS.items()), 2)
    found["moments_s"] = round(sum(count * factors[K]["copy"] for K, count in FACTORS.items()), 2)
    total = sum(found["of_seconds"].values()) + found["factors_s"] + found["moments_s"]
    return {**found, "minutes": round(total / 60, 3), "weights": sum(n * N * K for (N, K), n in COUNTS.items())}


def main() -> None:
    """Measure."""
    rows, given = arguments(__doc__.splitlines()[0])
    dry = rows.dry
    device = CPU if dry else torch.device("cuda")
    moments = Moments(device)

    def shape(size: int) -> int:
        return TINY[size] if dry else size

    def sized(N: int, K: int) -> None:
        N, K = shape(N), shape(K)
        for text in FORMATS:
            rows.measure(f"encoding/{N}x{K}/{text}", partial(timed, N, K, text, moments, device))

    def compare(N: int, K: int) -> None:
        for text in FORMATS:
            rows.measure(f"encoding/compare/{N}x{K}/{text}", partial(compared, N, K, text, device))

    rows.measure(
        f"encoding/parts/{shape(4096)}x{shape(4096)}/nf3-g64",
        lambda: parts(shape(4096), shape(4096), "nf3-g64", moments, device),
    )
    sized(*SHAPES[0])
    compare(*((96, 128) if dry else (1024, 1024)))
    for N, K in SHAPES:
        if K == 4096:
            sized(N, K)
    rows.measure(f"encoding/factor/{shape(4096)}", lambda: factored(shape(4096), moments, device))
    sized(*SHAPES[2])
    rows.measure(f"encoding/factor/{shape(14336)}", lambda: factored(shape(14336), moments, device))
    rows.measure("encoding/7b", lambda: whole_model(given.out / "encoding.jsonl", shape))
    if not dry:
        compare(1024, 4096)
        rows.measure("encoding/parts/4096x14336/nf3-g64", lambda: parts(4096, 14336, "nf3-g64", moments, device))


if __name__ == "__main__":
    run(main)
