"""Fill the tables of README.md and docs/ from the JSON in benchmarks/results: no figure there is typed by hand.

python benchmarks/tables.py [--check]

A document marks a place with `<!-- results:NAME -->` and `<!-- end -->`; what stands between is replaced.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Callable

from cpp_tables import CPP_TABLES
from engine_tables import ENGINE_TABLES
from fleet_tables import FLEET_TABLES
from genai_tables import GENAI_TABLES
from gpu_own_tables import GPU_OWN_TABLES
from gpu_tables import GPU_TABLES
from interchange_tables import INTERCHANGE_TABLES
from latency_tables import LATENCY_TABLES
from markdown_tables import ROOT, grid, load
from method_tables import METHOD_TABLES
from quantizer_tables import QUANTIZER_TABLES
from serve_table import SERVE_TABLES

sys.path.insert(0, str(ROOT / "examples"))
from demo_table import LEVEL, table_cells

DOCUMENTS = (
    "README.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
)
_PLACE = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def demo() -> str:
    """README: three GPUs, one adapter."""
    found = load("demo")
    rows = table_cells(found["rows"], found["fp16_perplexity"])
    for cells in rows[:-1]:
        cells[5] = f"**{cells[5]}**"
    head = [
        "GPU",
        "bits per weight",
        "matrices",
        "engine MB",
        "perplexity, no LoRA",
        "its own LoRA",
        "neighbours' LoRA",
    ]
    took = f", {found['seconds']:.0f} s on two CPU cores after installing" if found["in_one_run"] else ""
    return (
        f"{grid(head, rows)}\n\n`make demo`{took}. Perplexities are over the same {found['tokens']:,} held-out tokens; "
        f'"{LEVEL}": within two standard errors of its own LoRA.'
    )


def allocation() -> str:
    """Times of allocations, and their distance from the bound."""
    found = load("allocation")
    names = {
        "candidates": "the candidates of a plan, all sizes at once",
        "near_optimal": "one budget",
    }
    rows = [
        [
            names[row["what"]],
            f"{row['median_s'] * 1e3:.1f}",
            f"{row['worst_s'] * 1e3:.1f}",
            f"{row['median_above_lower_bound']:.2%}",
            f"{row['share_within_1_percent']:.0%}",
        ]
        for row in found["rows"]
    ]
    head = ["allocation", "median ms", "worst ms", "above the bound, median", "within 1 % of it"]
    return (
        f"{grid(head, rows)}\n\n{found['groups']} free matrices × {found['formats']} formats, {found['tables']} tables "
        f"of random costs, {found['budgets']} budgets each (`python benchmarks/allocation.py`)."
    )


def search() -> str:
    """Hypervolume of the search and its rivals."""
    found = load("search")
    names = {
        "mutation": "random mutation of front members",
        "spread": "allocations at spread budgets",
        "search": "allocations in the widest gaps of the front (`coatrt search`)",
    }
    rows = [
        [
            names[method],
            f"{row['mean']:.4f}" + (f" ± {row['std']:.4f}" if row["std"] else ""),
            f"{row['short_of_all']:.4f}",
        ]
        for method, row in found["hypervolume"].items()
    ]
    bits, loss = found["reference"]
    return (
        grid(["proposals", "hypervolume", "short of the front of all runs"], rows)
        + f"\n\nA byte-level Llama of {found['groups']} free matrices × {len(found['formats'])} formats, no adapter, "
        f"{found['evaluations']} evaluations each, mutation with three seeds (mean ± standard deviation); reference "
        f"point {bits:.3f} bits per weight and loss log 256 = {loss:.3f} nats per byte (`python benchmarks/search.py`)."
    )


def preflight() -> str:
    """What the preflight takes."""
    rows = [
        [row["model"], f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 1e9:.2f}", f"{row['difference']:.1e}"]
        for row in load("preflight")["rows"]
    ]
    return grid(["model", "seconds", "GB above the imports", "difference of logits"], rows)


def install() -> str:
    """What an installation takes, and a run in it."""
    found = load("install")
    (lean,) = (row for row in found["environments"] if row["extras"] == "cpu")
    runs = [
        ("torch and transformers for the tokenizer, as before", found["before"]),
        (f"`{lean['command']}`", lean["run"]),
    ]
    rows = [
        [
            name,
            f"{run['first_token_cpu_s']:.1f}",
            f"{run['first_token_s']:.1f}",
            f"{run['first_token_mb']:.0f}",
            f"{run['whole_cpu_s']:.1f}",
        ]
        for name, run in runs
    ]
    head = ["`coatrt run`", "CPU s to the first token", "s to the first token", "MB resident", "CPU s in all"]
    return (
        f"{grid(head, rows)}\n\n`{lean['command']}` takes {lean['mb']:.0f} MB with its virtual environment, "
        f"{len(lean['packages'])} packages, no torch; installing took {lean['install_seconds']:.0f} s with downloads. "
        f"The bundle: SmolLM2-135M at {found['bits']:.0f} bits, {found['tokens']} tokens, the median of "
        f"{lean['run']['repeat']} runs in turn (`{found['command']}`)."
    )


_MAKERS = (install, demo, allocation, search, preflight)
TABLES: dict[str, Callable[[], str]] = {
    **{maker.__name__: maker for maker in _MAKERS},
    **ENGINE_TABLES,
    **FLEET_TABLES,
    **INTERCHANGE_TABLES,
    **LATENCY_TABLES,
    **QUANTIZER_TABLES,
    **METHOD_TABLES,
    **CPP_TABLES,
    **GENAI_TABLES,
    **GPU_TABLES,
    **GPU_OWN_TABLES,
    **SERVE_TABLES,
}


def _wrapped(line: str) -> str:
    """Return prose in lines of at most 118 characters that begin no list, and rows of tables as they are."""
    if line.startswith("|"):
        return line
    lines = textwrap.wrap(line, 118, break_long_words=False, break_on_hyphens=False)
    for after in lines[1:]:
        assert not re.match(r"([-+*#>]|\d+[.)]) ", after), f"Markdown would read a list in: {after}"
    return "\n".join(lines)


def _table(name: str) -> str:
    try:
        return "\n".join(map(_wrapped, TABLES[name]().split("\n")))
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
