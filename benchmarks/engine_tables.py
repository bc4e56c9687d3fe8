"""Tables of docs/evidence/engines.md: engines, graphs, a bundle on the CPU."""

from collections.abc import Callable
from typing import Any

from markdown_tables import grid, load

__all__ = ["ENGINE_TABLES"]


def sizes() -> str:
    """Engine bytes by format and GPU."""
    found = load("engine_size")["smollm2_135m"]
    devices = list(dict.fromkeys(row["device"] for row in found))
    sms = {"t4": "SM75", "rtx-3060": "SM86", "rtx-4090": "SM89", "rtx-5090": "SM120"}
    lines: dict[str, dict[str, Any]] = {}
    for row in found:
        lines.setdefault(row["format"], {"ideal": row["ideal_bytes"]})[row["device"]] = row
    rows = [
        [text, f"{line['ideal'] / 1e6:.1f}"]
        + [f"{line[d]['engine_bytes'] / 1e6:.1f} ({line[d]['ratio']:.2f})" if d in line else "–" for d in devices]
        for text, line in lines.items()
    ]
    return grid(["format", "ideal MB", *(f"{sms[name]} MB (ratio)" for name in devices)], rows)


def engine_program() -> str:
    """Kernels of a layer and weights decoded in every step, read from engines."""
    rows: dict[tuple[str, str], dict[bool, dict[str, Any]]] = {}
    for row in load("engine_program")["rows"]:
        rows.setdefault((row["format"], row["device"]), {})[row["lora"]] = row
    lines = []
    for (text, device), pair in rows.items():
        decoded = ", ".join(name.split(".")[-1].removesuffix("_proj") for name in pair[True]["decoded"])
        kernels = [f"{pair[lora]['per_layer']['kernels']:g}" for lora in (False, True)]
        lines.append([text, device, *kernels, decoded or "none"])
    return grid(["format", "device", "kernels a layer", "with LoRA", "weights decoded in every step"], lines)


def billion() -> str:
    """A 1B-shaped model."""
    row = load("engine_size")["random_1b"]
    return (
        f"A random 1B-shaped Llama (16 layers, hidden 2,048, vocabulary 128,256, tied) in {row['format']}, no LoRA, "
        f"SM86: {row['engine_bytes'] / 1e6:.1f} MB, ideal {row['ideal_bytes'] / 1e6:.1f} MB: {row['ratio']:.3f} ×."
    )


def export() -> str:
    """Checkpoint to engine against torch.onnx."""
    found = load("export")
    rows = []
    for name, runs in found["runs"].items():
        middle = sorted(runs, key=lambda run: run["export_s"] + run["build_s"])[len(runs) // 2]
        rows.append(
            [
                name,
                f"{middle['export_s']:.1f}",
                f"{middle['build_s']:.1f}",
                f"{found['median_total_s'][name]:.1f}",
                f"{middle['engine_bytes'] / 1e6:.1f}",
            ]
        )
    head = ["median of three", "graph s", "build s", "together s", "engine MB"]
    return f"{grid(head, rows)}\n\n{found['ratio']:.1f} × faster than torch.onnx trace and build."


def interactive() -> str:
    """What a user waits for."""
    found = load("interactive")
    emission, more = found["emission"], found["bundles"][1:]
    whole, build = (", ".join(f"{row[key]:.0f}" for row in more) for key in ("seconds", "build_s"))
    return (
        f"`coatrt --help` {found['help_median_s']:.2f} s (median of five); the hypernetwork emits all "
        f"{emission['tensors']} tensors of rank {emission['rank']} in {emission['p50_ms']:.1f} ms (p50; p99 "
        f"{emission['p99_ms']:.1f}); a further "
        f"configuration of the same model becomes a bundle, engine included, in {whole} s, of which the builder takes "
        f"{build}."
    )


def memory() -> str:
    """Peak memory of the export."""
    found = load("memory")
    rows = [
        [row["format"], f"{row['peak_bytes'] / 1e9:.2f}", f"{row['share']:.2f}", f"{row['seconds']:.0f}"]
        for row in found["rows"]
    ]
    return f"A {found['checkpoint_bytes'] / 1e9:.2f} GB checkpoint of 7B-shaped layers.\n\n" + grid(
        ["format", "peak GB", "share of the checkpoint", "seconds"], rows
    )


def parity() -> str:
    """ONNX Runtime against torch."""
    found = load("parity")
    worst = max(found["relative"], key=lambda name: found["relative"][name]["difference"])
    uniform = [name for name in found["relative"] if not name.startswith("random")]
    return (
        f"{found['relative'][worst]['difference']:.1e} at worst ({worst}) over {len(uniform)} formats on "
        f"all matrices and {len(found['relative']) - len(uniform)} random maps; a batch of two unequal prompts differs "
        f"from each alone by {found['unequal_batch']:.1e}. The LoRA moves logits by "
        f"{min(row['lora_effect'] for row in found['relative'].values()):.2f} of the largest or more."
    )


def cpu() -> str:
    """A bundle in ONNX Runtime."""
    found = load("cpu_bundle")
    rows = [[f"prefill of {row['tokens']}, LoRA {'on' if row['lora'] else 'off'}", row] for row in found["prefill"]] + [
        [f"decode, LoRA {'on' if row['lora'] else 'off'}", row] for row in found["decode"]
    ]
    lines = [
        [name, f"{row['p50_ms']:.1f}", f"{row['p90_ms']:.1f}", f"{row['p99_ms']:.1f}", f"{row['tokens_per_s']:.0f}"]
        for name, row in rows
    ]
    size = found["bytes_per_token"]
    return (
        grid(["", "p50 ms", "p90 ms", "p99 ms", "tokens/s"], lines)
        + f"\n\nLoRA overhead at decode {100 * found['lora_overhead']:+.1f} %; load {found['load_s']:.1f} s; "
        f"{size['total'] / 1e6:.0f} MB per token (weights {size['weights'] / 1e6:.0f}, LoRA {size['lora'] / 1e6:.0f}, "
        f"KV cache {size['kv_cache'] / 1e6:.0f}) as the engine would read them; ONNX Runtime reads NormalFloat, fp8 "
        "and nvfp4 matrices as decoded float32 instead."
    )


def gemma3() -> str:
    """Gemma 3 270M from training to text."""
    found = load("gemma3")
    perplexity, seconds = found["perplexity"], found["seconds"]
    formats = ", ".join(f"{count} {name}" for name, count in sorted(found["formats"].items()))
    row = [found["device"], f"{found['bits']:.2f}", formats, f"{found['engine_bytes'] / 1e6:.0f}"]
    row += [f"{perplexity[name]:.1f}" for name in ("base", "quantized", "adapted")]
    head = ["GPU", "bits per weight", "matrices", "engine MB", "perplexity, original", "no LoRA", "its LoRA"]
    took = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return (
        f"{grid(head, [row])}\n\n{found['steps']} steps; {found['tokens']:,} held-out tokens in passages of "
        f"{found['length']}; {took}."
    )


_MAKERS = (
    gemma3,
    sizes,
    engine_program,
    billion,
    export,
    interactive,
    memory,
    parity,
    cpu,
)
ENGINE_TABLES: dict[str, Callable[[], str]] = {maker.__name__: maker for maker in _MAKERS}
