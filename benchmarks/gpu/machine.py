"""The machine, its two ceilings (memory bandwidth, matrix products), and the cost of launches and graph replays."""

import platform
from typing import Any

import torch
from rows import arguments, run, summary
from runtime import event_times, ort, stream


def versions(dry: bool) -> dict[str, Any]:
    """Return names and versions."""
    import transformers

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "onnxruntime": ort.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "providers": ort.get_available_providers(),
    }
    if not dry:
        facts = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": facts.name,
            "sm": facts.major * 10 + facts.minor,
            "multiprocessors": facts.multi_processor_count,
            "memory_gib": round(facts.total_memory / 2**30, 1),
            "l2_mib": facts.L2_cache_size / 2**20,
        }
        try:
            import pynvml

            pynvml.nvmlInit()
            found["driver"] = pynvml.nvmlSystemGetDriverVersion()
        except Exception as error:
            found["driver"] = repr(error)
    return found


def bandwidth(dry: bool) -> dict[str, Any]:
    """Return GB/s of a large copy (bytes read plus written) and of a reduction (bytes read)."""
    device = "cpu" if dry else "cuda"
    count = 1 << (16 if dry else 29)
    source = torch.randint(0, 2**30, (count,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    found = {}
    with torch.cuda.stream(stream()) if not dry else torch.no_grad():
        copy = summary([2 * source.nbytes / ms / 1e6 for ms in event_times(lambda: target.copy_(source), 20, dry=dry)])
        halves = source.view(torch.float16)
        reading = event_times(lambda: torch.amax(halves), 20, dry=dry)
        found = {"copy_gb_s": copy, "read_gb_s": summary([source.nbytes / ms / 1e6 for ms in reading])}
    return found


def products(dtype: torch.dtype, dry: bool) -> dict[str, Any]:
    """Return TFLOP/s of a square product on random data."""
    device, size = ("cpu", 64) if dry else ("cuda", 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    times = event_times(lambda: a @ b, 20, dry=dry, warm=5)
    return {"tflop_s": summary([2 * size**3 / ms / 1e9 for ms in times], 1)}


def launches(dry: bool) -> dict[str, Any]:
    """Return microseconds a small kernel costs alone in a stream and inside a replayed graph of 200."""
    if dry:
        return {"stream_us": 1.0, "graph_us": 1.0}
    x = torch.zeros(64, device="cuda")

    def many() -> None:
        for _ in range(200):
            x.add_(1.0)

    alone = event_times(many, 20, dry=dry)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream()):
        many()
    replay = event_times(graph.replay, 50, dry=dry)
    single = torch.cuda.CUDAGraph()
    with torch.cuda.graph(single, stream=stream()):
        x.add_(1.0)
    one = event_times(single.replay, 50, dry=dry)
    return {
        "stream_us": summary([ms * 5 for ms in alone]),
        "graph_us": summary([ms * 5 for ms in replay]),
        "replay_of_one_us": summary([ms * 1e3 for ms in one]),
    }


def main() -> None:
    """Measure."""
    rows, given = arguments(__doc__.splitlines()[0])
    dry = given.dry_run
    rows.measure("machine/versions", lambda: versions(dry))
    rows.measure("machine/bandwidth", lambda: bandwidth(dry))
    for dtype in (torch.float16, torch.bfloat16):
        rows.measure(f"machine/product/{str(dtype)[6:]}", lambda dtype=dtype: products(dtype, dry))
    rows.measure("machine/launches", lambda: launches(dry))


if __name__ == "__main__":
    run(main)
