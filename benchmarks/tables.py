"""Fill the tables of README.md and docs/ from the JSON in benchmarks/results: no figure there is typed by hand.

python benchmarks/tables.py [--check]

A document marks a place with `<!-- results:NAME -->` and `<!-- end -->`; what stands between is replaced.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "method"))

import report
from fleet_tables import FLEET_TABLES
from gpu_tables import GPU_TABLES
from markdown_tables import ROOT, grid, load

DOCUMENTS = ("README.md", "docs/engines.md", "docs/method.md", "docs/formats.md", "docs/planning.md", "docs/cpp.md",
             "docs/gpu.md")  # fmt: skip
_PLACE = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def demo() -> str:
    """README: three GPUs, one adapter."""
    found = load("demo")
    rows = [
        [row["device"], f"{row['bits']:.2f}", ", ".join(f"{n} × {text}" for text, n in row["formats"].items()),
         f"{row['engine_bytes'] / 1e6:.1f}", f"{row['ideal_bytes'] / 1e6:.1f}", f"{row['without']:.1f}",
         f"**{row['with']:.1f}**"]
        for row in found["rows"]
    ]  # fmt: skip
    rows.append(["fp16 base", "16.00", "", "", "", f"{found['fp16_perplexity']:.1f}", ""])
    head = ["GPU", "bits per weight", "matrices", "engine MB", "ideal MB", "perplexity, quantized", "with its LoRA"]
    return f"{grid(head, rows)}\n\n`make demo`, {found['seconds']:.0f} s on two CPU cores after installing."


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
        rows.append([
            name, f"{middle['export_s']:.1f}", f"{middle['build_s']:.1f}", f"{found['median_total_s'][name]:.1f}",
            f"{middle['engine_bytes'] / 1e6:.1f}",
        ])  # fmt: skip
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
    return (
        f"A {found['checkpoint_bytes'] / 1e9:.2f} GB checkpoint of 7B-shaped layers.\n\n"
        + grid(["format", "peak GB", "share of the checkpoint", "seconds"], rows)
    )  # fmt: skip


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
    rows = [
        [f"prefill of {row['tokens']}, LoRA {'on' if row['lora'] else 'off'}", row] for row in found["prefill"]
    ] + [[f"decode, LoRA {'on' if row['lora'] else 'off'}", row] for row in found["decode"]]  # fmt: skip
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


def allocation() -> str:
    """Time of the knapsack."""
    found = load("allocation")
    return (
        f"{found['groups']} free matrices × {found['formats']} formats, {found['allocations']} allocations under "
        f"bounds on bytes and on cost: {found['worst_s']:.2f} s at worst, {found['median_s']:.3f} s in the median, "
        "the import of scipy aside."
    )


def predictors(quantizer: str) -> str:
    """Rank correlation of predicted with measured loss."""
    found = load(f"predictors_{quantizer}")
    names = {"bits": "average bits alone", "fisher": "½ Σ F∘ΔW²", "kfac": "½ Σ G ΔW H ΔWᵀ", "tokens": "½ E (gᵀ ΔW x)²",
             "measured": "measured, one group at a time",
             "kfac, down_proj fisher": "kfac, but down_proj by fisher",
             "kfac × measured": "geometric mean of kfac and measured"}  # fmt: skip
    rows = [
        [names[name], f"`{name}`" if name in ("fisher", "kfac", "tokens") else "",
         *(f"{row[kind]:.3f}" for kind in ("all", "allocated", "random")),
         f"{found['seconds'][name]:.0f}" if name in found["seconds"] else ""]
        for name, row in found["spearman"].items()
    ]  # fmt: skip
    head = ["cost", "name", "all", "allocated", "random", "seconds"]
    return (
        f"{grid(head, rows)}\n\nSpearman's rank correlation with the held-out loss of {len(found['rows'])} "
        f"configurations of SmolLM2-135M, quantizer {quantizer}, without adapter ({found['held_out_tokens']} held-out "
        f"tokens; costs from {found['calibration_tokens']} tokens, measured ones from {found['measured_tokens']}; "
        "seconds on a busy machine)."
    )


def cross() -> str:
    """Losses under LoRAs made for other configurations."""
    found = load("cross")
    names = {"single": "trained for", "same-theta": "emitted by θ for"}
    losses = {(row["arm"], row["made_for"], row["under"]): row["loss"] for row in found["rows"]}
    rows = [
        [f"{names[arm]} {made:g} bits", *(f"{losses[arm, made, under]:.3f}" for under in found["budgets"])]
        for arm in names
        for made in found["budgets"]
    ]
    return grid(["LoRA", *(f"under {bits:g} bits" for bits in found["budgets"])], rows)


def search() -> str:
    """Hypervolume of the search and its rivals."""
    found = load("search")
    names = {"mutation": "random mutation of front members", "allocation": "prior costs, spread budgets",
             "budgets": "prior costs, chosen budgets", "surrogate": "surrogate"}  # fmt: skip
    rows = [
        [names[method], f"{row['mean']:.4f} ± {row['std']:.4f}", f"{row['short_of_all']:.4f}"]
        for method, row in found["hypervolume"].items()
    ]
    bits, loss = found["reference"]
    return (
        grid(["proposals", "hypervolume", "short of the front of all runs"], rows)
        + f"\n\nA byte-level Llama of {found['groups']} free matrices × {len(found['formats'])} formats, no adapter, "
        f"{found['evaluations']} evaluations each, mean ± standard deviation of three seeds; reference point "
        f"{bits:.3f} bits per weight and loss log 256 = {loss:.3f} nats per byte (`python benchmarks/search.py`)."
    )


def tasks() -> str:
    """What the real tasks hold."""
    rows = []
    for row in load("tasks")["rows"]:
        untrained = row["untrained"]
        known = (
            f"accuracy {untrained['accuracy']:.2f} of {row['measured']}"
            if "accuracy" in untrained
            else f"perplexity {math.exp(untrained['loss']):.1f} over {row['measured']} blocks"
        )
        majority = f"{row['majority']:.3f}" if "majority" in row else "–"
        rows.append([row["task"], row["kind"], f"{row['train']:,}", f"{row['held_out']:,}", str(row["dropped"]),
                     str(row["longest"]), majority, known])  # fmt: skip
    head = [
        "task",
        "kind",
        "to train on",
        "held out",
        "dropped",
        "longest, tokens",
        "majority",
        "SmolLM2-135M untrained",
    ]
    return grid(head, rows)


def quantizers() -> str:
    """The five quantizers by format."""
    found = load("quantizers")
    rows = [
        [row["format"], row["quantizer"], f"{row['weight_error']:.3f}", f"{row['output_error']:.3f}",
         f"{row['perplexity']:,.1f}" if row["perplexity"] < 1e5 else f"{row['perplexity']:.0e}",
         f"{row['encode_cpu_s']:.0f}"]
        for row in found["rows"]
    ]  # fmt: skip
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


def compensation() -> str:
    """What a low-rank part in closed form would give back."""
    found = load("compensation")
    rows = [[row["format"], row["quantizer"], *(f"{value:.3f}" for value in row["errors"])] for row in found["rows"]]
    head = ["format", "quantizer", *(f"rank {rank}" if rank else "error" for rank in found["ranks"])]
    layers = ", ".join(map(str, found["layers"]))
    return f"{grid(head, rows)}\n\nMeans over the {found['matrices']} matrices of layers {layers}."


def training_step() -> str:
    """A step against PEFT's."""
    found = load("training_step")
    ours, theirs = (found["median_s"][name] for name in ("coatrt", "peft"))
    low, high = found["ratio_quartiles"]
    return (
        f"a step takes {ours:.2f} s against {theirs:.2f} s of plain LoRA in PEFT with as many passes of the same "
        f"tokens: {found['ratio']:.2f} ×, each step held against the two of PEFT around it, half of the ratios within "
        f"{low:.2f} to {high:.2f} (`python benchmarks/training_step.py`)."
    )


def cpp_runtime() -> str:
    """The C++ library against Python."""
    rows = []
    for row in load("cpp_runtime")["rows"]:
        speed, under = row["decode"], row["under_load"]
        same = row["tokens_equal"] and row["text_equals_coatrt_run"]
        rows.append([
            row["bundle"], "equal" if same else "**differ**", f"{row['logits_difference']:.1e}",
            f"{row['lora_equal']} of {row['lora_tensors']}", f"{speed['cpp_ms']:.1f} / {speed['python_ms']:.1f}",
            f"{speed['ratio']:.3f} ({speed['ratio_quartiles'][0]:.3f} – {speed['ratio_quartiles'][1]:.3f})",
            f"{row['emit_ms']:.0f} + {row['bind_ms']:.2f}",
            f"{under['wrong']} wrong of {under['generations']}, p50 {under['swap_p50_ms']:.0f} ms",
        ])  # fmt: skip
    head = ["bundle", "tokens, text", "logits differ by", "LoRA tensors equal bit for bit",
            "decode ms/token C++ / Python",
            "ratio (quartiles)", "emit + bind ms", "changed before every generation, 4 threads"]  # fmt: skip
    return grid(head, rows)


def cpp_service() -> str:
    """The service under load."""
    found = load("cpp_service")
    request, first, memory = found["request"], found["first_token"], found["rss_mb"]
    return (
        f"{found['clients']} clients for {found['seconds']:.0f} s on {found['sessions']} sessions: "
        f"{found['requests']} requests, {len(found['errors'])} errors, {found['wrong']} with a wrong token; "
        f"p50 {request['p50_ms']:.0f} ms, p99 {request['p99_ms']:.0f} ms for {found['tokens_per_request']} tokens, "
        f"waiting included, to the first token p50 {first['p50_ms']:.0f} ms, p99 {first['p99_ms']:.0f} ms; "
        f"{found['tokens_per_s']:.0f} tokens/s; resident memory {memory['after_a_quarter']:.0f} MB after a quarter of "
        f"the time, {memory['at_the_end']:.0f} MB at the end."
    )


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
            rows.append([f"{tokens:,}", K, f"{at[0][K]:.3f}", f"{at[best][K]:.3f}", f"{1 - best:.2f}",
                         f"{at[None][K]:.3f}", f"{tokens / (tokens + int(K)):.2f}"])  # fmt: skip
    head = ["tokens", "inputs", "error, GPTQ", "least error", "kept for it", "error, `feedback`", "kept, T / (T + K)"]
    return (
        f"{grid(head, rows)}\n\n{found['model']}, layers {', '.join(map(str, found['layers']))}, {found['format']}; "
        f"output error on {found['measured_on_tokens']:,} other tokens, means over the matrices."
    )


_MAKERS = (
    demo, sizes, billion, export, interactive, memory, parity, cpu, tasks, quantizers, calibration_size, shrinkage,
    allocation, search, cross, training_step, tied_table, compensation, cpp_runtime, cpp_service,
)  # fmt: skip
TABLES: dict[str, Callable[[], str]] = {maker.__name__: maker for maker in _MAKERS} | FLEET_TABLES | GPU_TABLES
for _task in ("sotu", "trec"):
    TABLES[f"method_{_task}"] = partial(report.main_table, "smollm2", _task)
    TABLES[f"variants_{_task}"] = partial(report.main_table, "smollm2", _task, rivals=False)
    TABLES[f"rivals_{_task}"] = partial(report.rivals_table, "smollm2", _task)
    TABLES[f"gaps_{_task}"] = partial(report.gaps, "smollm2", _task)
    TABLES[f"unseen_{_task}"] = partial(report.unseen_table, "smollm2", _task)
TABLES["accuracy_trec"] = partial(report.accuracy_table, "smollm2", "trec")
for _quantizer in ("mse", "gptq"):
    TABLES[f"predictors_{_quantizer}"] = partial(predictors, _quantizer)
for _task, _name in (("sotu", "feedback"), ("trec", "feedback_trec")):
    TABLES[f"method_{_name}"] = partial(report.main_table, "smollm2-feedback", _task)
    TABLES[f"rivals_{_name}"] = partial(report.rivals_table, "smollm2-feedback", _task)
TABLES["gaps_feedback"] = partial(report.gaps, "smollm2-feedback", "sotu")
TABLES["unseen_feedback"] = partial(report.unseen_table, "smollm2-feedback", "sotu")
TABLES["accuracy_feedback_trec"] = partial(report.accuracy_table, "smollm2-feedback", "trec")
TABLES["method_micro"] = partial(report.main_table, "micro", "sotu")
TABLES["gaps_micro"] = partial(report.gaps, "micro", "sotu")
TABLES["rivals_micro"] = partial(report.rivals_table, "micro", "sotu")


def _table(name: str) -> str:
    try:
        return TABLES[name]()
    except FileNotFoundError:
        return "Not measured yet."


def filled(text: str) -> str:
    """Return a document with its places filled."""
    return _PLACE.sub(lambda match: f"{match[1]}{_table(match[2])}\n{match[3]}", text)


def stale() -> list[str]:
    """Return the documents whose tables are not what the results say."""
    return [name for name in DOCUMENTS if filled(text := (ROOT / name).read_text(encoding="utf-8")) != text]


def main() -> None:
    """Fill the documents, or say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="Change nothing; fail where a document is stale.")
    check = parser.parse_args().check
    for name in stale():
        if check:
            sys.exit(f"{name} is stale; run python benchmarks/tables.py")
        (ROOT / name).write_text(filled((ROOT / name).read_text(encoding="utf-8")), encoding="utf-8")
        print(f"filled {name}")


if __name__ == "__main__":
    main()
