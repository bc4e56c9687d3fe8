"""Tables of docs/guides/checkpoints.md: exported files in llama.cpp, and codes with zero points in our formats."""

from collections.abc import Callable

from markdown_tables import grid, load

__all__ = ["INTERCHANGE_TABLES"]


def interchange() -> str:
    """Losses of exported configurations in llama.cpp, and what transformers loads."""
    found = load("interchange")
    rows = []
    for case in found["llama"]:
        named = ", ".join(f"{count} {fmt}" for fmt, count in case["formats"].items())
        for label, key in (("no", "without_lora"), ("yes", "with_lora")):
            losses = case[key]
            cells = [losses[name] for name in ("coatrt", "llama.cpp", "llama.cpp, same values in F16")]
            rows.append([named, f"{case['file_bits_per_weight']:.2f}", label, *(f"{loss:.4f}" for loss in cells)])
    head = ["SmolLM2-135M in", "bits per weight of the file", "LoRA", "coatrt", "llama.cpp", "same values in F16"]
    theirs = found["transformers"]
    return (
        f"{grid(head, rows)}\n\nNats per token over {found['tokens']:,} held-out tokens "
        f"(`python benchmarks/interchange.py`). Of the compressed-tensors checkpoint of the first row, transformers "
        f"decompressed {theirs['equal_bit_for_bit']} of {theirs['matrices']} matrices to coatrt's values bit for bit, "
        f"and its logits with PEFT differed by at most {theirs['largest_logit_difference']:.1g} of the largest."
    )


def zero_points() -> str:
    """Codes with zero points, encoded again."""
    rows = [[name, f"{loss:.3f}"] for name, loss in load("interchange")["zero_points"].items()]
    return grid(["SmolLM2-135M, all linear layers", "nats per token"], rows)


INTERCHANGE_TABLES: dict[str, Callable[[], str]] = {"interchange": interchange, "zero_points": zero_points}
