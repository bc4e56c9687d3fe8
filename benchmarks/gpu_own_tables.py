"""The tables of docs/evidence/gpu.md on coatrt itself: its backend, its training, its encoding."""

from typing import Any

from markdown_tables import grid, load

__all__ = ["GPU_OWN_TABLES"]

FORMATS = ("nf2-g64", "nf3-g64", "int4-g64", "nvfp4", "fp8", "int8")
SHAPES = ("4096x4096", "14336x4096", "4096x14336")


def _rows() -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in load("gpu/h100")["rows"]}


def _speeds() -> dict[str, dict[str, Any]]:
    """Return what was measured of the backend by model, formats and LoRA."""
    rows = _rows()
    kinds = {"int4-g64, no LoRA": "int4-g64/base", "int4-g64, LoRA": "int4-g64/lora", "mixed, LoRA": "mixed/lora"}
    keys = {
        f"{model.upper()} {label}": f"backend/speed/{model}/{kind}"
        for model in ("135m", "1b", "7b")
        for label, kind in kinds.items()
    }
    return {label: rows[key] for label, key in keys.items() if key in rows}


def gpu_backend() -> str:
    """Decode steps and prefill of the backend cuda."""
    lines = [
        [
            label,
            f"{row['decode_ms']['p50_ms']:.2f}",
            f"{row['decode_ms']['p99_ms']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['decode_no_graph_ms']['p50_ms']:.1f}",
            f"{row['prefill_ms']['p50_ms']:.1f}",
        ]
        for label, row in _speeds().items()
    ]
    return grid(["", "decode ms", "p99", "tokens/s", "no graph ms", "prefill of 512 ms"], lines)


def gpu_backend_load() -> str:
    """Loading, memory and LoRA switches of the backend cuda."""
    lines = [
        [
            label,
            f"{row['load_s']:.1f}",
            f"{row['memory_gb']:.2f}",
            f"{row['switch_packed_ms']['p50_ms']:.2f}" if "switch_packed_ms" in row else "",
        ]
        for label, row in _speeds().items()
    ]
    return grid(["", "load s", "GB", "switch ms"], lines)


def gpu_parity() -> str:
    """How far the backend's logits are from torch's."""
    machine, rows = load("gpu/h100")["machine"], _rows()
    found = {key.rpartition("/")[2]: row for key, row in rows.items() if key.startswith("backend/parity/")}
    worst = max(found, key=lambda text: found[text]["relative_error"])
    apart = max(row["replay_against_none"] for row in found.values())
    same = "A replayed step gives the same bits as one that is not."
    return (
        f"On an {machine['gpu']} (driver {machine['driver']}, onnxruntime-gpu {machine['onnxruntime']}) the logits of "
        f"a tiny random Llama are within {found[worst]['relative_error']:.1e} of the largest of torch's in float32 "
        f"with the same decoded weights: {len(found)} formats, with LoRA, a batch of two unequal prompts, prefill and "
        f"16 steps. {same if apart == 0 else f'A replayed step differs by {apart:.1e} from one that is not.'}"
    )


def gpu_training() -> str:
    """A training step against PEFT's."""
    rows = _rows()
    small, large = rows["training/step"], rows["training/step/8x512"]
    alone = rows["training/alone/coatrt"]

    def said(row: dict[str, Any]) -> str:
        ours, peft = (1e3 * row["median_s"][name] for name in ("coatrt", "peft"))
        low, high = row["ratio_quartiles"]
        return f"{ours:.0f} ms, of PEFT {peft:.0f} ms: {row['ratio']:.2f} × (quartiles {low:.2f} and {high:.2f})"

    return (
        f"A step of two passes of 2 × 128 tokens on a random SmolLM2-135M takes {said(small)}; of 8 × 512 tokens "
        f"{said(large)}, each step held against the two of PEFT around it. The smaller step is "
        f"{alone['launches']:,} launches, during which the GPU works {alone['gpu_busy_ms']:.0f} ms: the host decides. "
        f"Alone, coatrt's training takes {alone['peak_mb'] / 1e3:.1f} GB at its peak."
    )


def gpu_encoding() -> str:
    """Seconds of encoding with error feedback by shape and format."""
    rows = _rows()
    lines = [
        [
            text,
            *(f"{1e3 * rows[f'encoding/{size}/{text}']['with_copies']:.0f}" for size in SHAPES),
            f"{rows[f'encoding/compare/1024x4096/{text}']['differ']:.1e}",
            f"{rows[f'encoding/compare/1024x4096/{text}']['relative_difference']:.0e}",
        ]
        for text in FORMATS
    ]
    sizes = [f"{size.replace('x', ' × ')} ms" for size in SHAPES]
    return grid(["`feedback`", *sizes, "codes unlike the CPU's", "output error unlike"], lines)


def gpu_encoding_7b() -> str:
    """The seconds of a whole model of 7B."""
    rows = _rows()
    whole = rows["encoding/7b"]
    parts = [rows[f"encoding/parts/{size}/nf3-g64"] for size in ("4096x4096", "4096x14336")]
    faster = [part["feedback_torch"] / part["feedback"] for part in parts]
    return (
        f"A model of 7B in these six formats: {whole['minutes']:.1f} minutes by these rates, copies to and from the "
        f"GPU and {whole['factors_s']:.0f} s of factors counted, disk and the measuring of moments not. The kernel is "
        f"{min(faster):.0f} to {max(faster):.0f} times as fast as the same loop in torch's operators."
    )


def gpu_packing() -> str:
    """What a cast of a LoRA on the host takes."""
    times = [row["pack_ms"]["p50_ms"] for key, row in _rows().items() if "pack_ms" in row]
    return f"Packing a LoRA, a cast to float16 on the CPU, takes {min(times):.0f} to {max(times):.0f} ms."


def gpu_readme() -> str:
    """What ran, in two sentences."""
    rows = _rows()
    rates = [
        f"{rows[f'backend/speed/{model}/int4-g64/lora']['tokens_per_s']:.0f} ({label})"
        for model, label in (("135m", "135M"), ("1b", "1B"), ("7b", "7B"))
    ]
    return (
        "On an H100 `--backend cuda` gave torch's logits of a tiny model in all formats. With random weights it "
        f"decoded {', '.join(rates[:2])} and {rates[2]} tokens/s in int4 with LoRA; a training step took "
        f"{rows['training/step']['ratio']:.2f} to {rows['training/step/8x512']['ratio']:.2f} × the time of PEFT's "
        "([measurements](docs/evidence/gpu.md))."
    )


_MAKERS = (
    gpu_backend,
    gpu_backend_load,
    gpu_packing,
    gpu_readme,
    gpu_parity,
    gpu_training,
    gpu_encoding,
    gpu_encoding_7b,
)
GPU_OWN_TABLES = {maker.__name__: maker for maker in _MAKERS}
