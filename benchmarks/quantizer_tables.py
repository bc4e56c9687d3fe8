"""Tables of docs/evidence/quantizers.md: quantizers and their calibration."""

from collections.abc import Callable

from markdown_tables import grid, load

__all__ = ["QUANTIZER_TABLES"]


def quantizers() -> str:
    """The quantizers by format."""
    found = load("quantizers")
    rows = [
        [
            row["format"],
            row["quantizer"],
            f"{row['weight_error']:.3f}",
            f"{row['output_error']:.3f}",
            f"{row['perplexity']:,.1f}" if row["perplexity"] < 1e5 else f"{row['perplexity']:.0e}",
            f"{row['encode_cpu_s']:.0f}",
        ]
        for row in found["rows"]
    ]
    head = ["format", "quantizer", "weight error", "output error", "perplexity", "CPU s"]
    return (
        f"{found['model']}, all linear matrices in the format, embedding in int8; {found['calibration_tokens']:,} "
        f"tokens of training speeches, perplexity on {found['held_out_tokens']:,} held-out ones (full precision "
        f"{found['full_precision']:.1f}); means over the matrices; one thread.\n\n{grid(head, rows)}"
    )


def tied_table() -> str:
    """What the embedding and head alone cost."""
    found = load("tied_table")
    names = list(dict.fromkeys(row["quantizer"] for row in found["rows"]))
    lines: dict[str, list[str]] = {}
    for row in found["rows"]:
        lines.setdefault(row["format"], []).append(f"{row['rise']:+.3f}")
    return grid(["format", *names], [[text, *cells] for text, cells in lines.items()])


def calibration_size() -> str:
    """Perplexity by tokens calibrated on."""
    found = load("calibration_size")
    tokens = list(dict.fromkeys(row["tokens"] for row in found["rows"]))
    lines = dict.fromkeys((row["format"], row["quantizer"]) for row in found["rows"])
    by = {(row["format"], row["quantizer"], row["tokens"]): row["perplexity"] for row in found["rows"]}
    rows = [[*line, *(f"{by[(*line, count)]:.1f}" for count in tokens)] for line in lines]
    rows += [
        [f"tokens for each of {width:,} inputs", "", *(f"{count / width:.2f}" for count in tokens)]
        for width in found["K"]
    ]
    return (
        f"{grid(['format', 'quantizer', *(f'{count:,} tokens' for count in tokens)], rows)}\n\n"
        f"{found['model']}, perplexity on {found['held_out_tokens']:,} held-out tokens as above (full precision "
        f"{found['full_precision']:.1f}), no adapter."
    )


def shrinkage() -> str:
    """What is taken off the off-diagonals of H: the best share, and coatrt's."""
    found = load("shrinkage")
    rows = []
    for tokens in dict.fromkeys(row["tokens"] for row in found["rows"]):
        at = {row["taken"]: row["error"] for row in found["rows"] if row["tokens"] == tokens}
        for K in at[None]:
            best = min((taken for taken in at if taken is not None), key=lambda taken: at[taken][K])
            rows.append(
                [
                    f"{tokens:,}",
                    K,
                    f"{at[0][K]:.3f}",
                    f"{at[best][K]:.3f}",
                    f"{1 - best:.2f}",
                    f"{at[None][K]:.3f}",
                    f"{tokens / (tokens + int(K)):.2f}",
                ]
            )
    head = ["tokens", "inputs", "error, GPTQ", "least error", "kept for it", "error, `feedback`", "kept, T / (T + K)"]
    return (
        f"{grid(head, rows)}\n\n{found['model']}, layers {', '.join(map(str, found['layers']))}, {found['format']}; "
        f"output error on {found['measured_on_tokens']:,} other tokens, means over the matrices."
    )


def refinement() -> str:
    """What each part of `refined` is worth."""
    found = load("refinement")
    formats = list(dict.fromkeys(row["format"] for row in found["rows"]))
    by = {(row["variant"], row["format"]): row for row in found["rows"]}
    variants = list(dict.fromkeys(row["variant"] for row in found["rows"]))

    def cell(variant: str, text: str) -> str:
        row = by.get((variant, text))
        return f"{row['loss']:.3f} ({row['encode_cpu_s']:.0f} s)" if row is not None else ""

    rows = [[variant, *(cell(variant, text) for text in formats)] for variant in variants]
    return (
        f"{grid(['variant', *formats], rows)}\n\n{found['model']}, held-out loss (full precision "
        f"{found['full_precision']:.3f}) and CPU seconds of encoding, as above."
    )


def uniform_scales() -> str:
    """What learned scales are worth if one format is used everywhere."""
    found = load("uniform_scales")
    rows = [
        [row["format"], f"{row['refined']:.3f}", f"{row['learned']:.3f}", f"{row['learning_cpu_s'] / 60:.0f}"]
        for row in found["rows"]
    ]
    return (
        f"{grid(['format', '`refined`', 'scales learned', 'CPU minutes'], rows)}\n\n{found['model']}, held-out loss "
        f"as above; {found['steps']} steps of {found['tokens_per_step']:,} tokens, one thread."
    )


_MAKERS = (
    quantizers,
    refinement,
    uniform_scales,
    tied_table,
    calibration_size,
    shrinkage,
)
QUANTIZER_TABLES: dict[str, Callable[[], str]] = {maker.__name__: maker for maker in _MAKERS}
