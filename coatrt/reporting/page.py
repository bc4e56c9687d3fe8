"""The page: one HTML file that needs nothing else."""

import math
from collections.abc import Sequence
from html import escape

from coatrt import __version__
from coatrt.reporting.collect import Entry, Report
from coatrt.reporting.figures import FIGURES, colour, draw

__all__ = ["page"]

_STYLE = """
:root{--ink:#1f2933;--faint:#616e7c;--line:#e4e7eb;--soft:#f5f7fa;--accent:#3b6fb6}
*{box-sizing:border-box}
body{margin:0;color:var(--ink);background:var(--soft);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header{background:linear-gradient(120deg,#1b2a41,#324a6d 60%,#3b6fb6);color:#fff;padding:44px 24px 40px}
header div,main{max-width:1000px;margin:0 auto}
header h1{margin:0 0 6px;font-size:30px;letter-spacing:-.4px}
header p{margin:0;opacity:.85}
main{padding:28px 24px 64px}
section{background:#fff;border:1px solid var(--line);border-radius:14px;padding:24px 26px;margin:0 0 22px;
box-shadow:0 1px 2px rgba(31,41,51,.04)}
h2{margin:0 0 4px;font-size:19px;letter-spacing:-.2px}
section>p{margin:0 0 16px;color:var(--faint);max-width:75ch}
svg{width:100%;height:auto;display:block}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(220px,1fr));gap:14px;margin:0 0 22px}
.card{background:#fff;border:1px solid var(--line);border-top:4px solid var(--c);border-radius:12px;padding:14px 16px}
.card b{font-size:16px}.card .big{font-size:25px;font-weight:650;margin:6px 0 0;letter-spacing:-.5px}
.card small{color:var(--faint);display:block}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{text-align:left;padding:7px 10px;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--faint);font-weight:600;white-space:nowrap}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr:last-child td{border-bottom:0}
code,pre{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--soft);border:1px solid var(--line);border-radius:8px;
padding:12px 14px;overflow-x:auto;margin:12px 0 0}
footer{color:var(--faint);font-size:13px;text-align:center}
"""

_TEXTS = {
    "pareto": (
        "Bytes against loss",
        "Every line is the front of what a device's formats allow; a point is the "
        "configuration chosen for a device. Losses are second-order estimates without the adapter: a ranking, "
        "not a forecast.",
    ),
    "bits": ("Bits per layer", "Where the bits went: one panel per distinct configuration."),
    "memory": ("Memory", "Everything a device holds, the reserve for its runtime included."),
    "latency": (
        "Latency against the bound",
        "Predicted time per token, and what reading the bytes at peak bandwidth alone would take.",
    ),
}


def page(report: Report, command: str) -> str:
    """Return the HTML of a report.

    Args:
        report: what to show.
        command: how it was made.
    """
    entries = report.entries
    parts = [f'<div class="cards">{"".join(_card(entries, entry) for entry in entries)}</div>']
    for name in FIGURES:
        if name == "latency" and not any(entry.plan.get("decode_seconds") for entry in entries):
            continue
        title, text = _TEXTS[name]
        svg = draw(name, report, "svg").decode()
        if name == "latency":
            sources = sorted({entry.plan["latency_source"] for entry in entries if entry.plan.get("latency_source")})
            text += " Predicted by " + "; ".join(sources) + "."
        parts.append(f'<section id="{name}"><h2>{title}</h2><p>{escape(text)}</p>{svg[svg.index("<svg") :]}</section>')
    parts += [_plans(entries), _quality(report), _provenance(report, command)]
    body = "\n".join(part for part in parts if part)
    model = escape(report.source.rsplit("/", 1)[-1])
    average = ", ".join(f"{entry.config.average_bits(entry.model):.2f}" for entry in entries[:8])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>coatrt: {model}</title><style>{_STYLE}</style></head><body>"
        f"<header><div><h1>{model}</h1><p>{len({e.config.hash for e in entries})} configurations for {len(entries)} "
        f"devices: {average} bits per weight</p></div></header><main>{body}"
        f"<footer>coatrt {__version__}</footer></main></body></html>\n"
    )


def _card(entries: Sequence[Entry], entry: Entry) -> str:
    plan, lines = entry.plan, []
    if plan.get("decode_seconds"):
        lines.append(f"{1 / plan['decode_seconds']:,.0f} tokens/s predicted")
    if plan.get("predicted_loss_increase") is not None:
        lines.append(f"loss +{plan['predicted_loss_increase']:.4f} before the adapter")
    if entry.engine_bytes:
        lines.append(f"engine {entry.engine_bytes / 1e6:.1f} MB, SM{entry.device['sm']}")
    elif plan.get("engine_bytes") and entry.device["sm"]:
        lines.append(f"engine {plan['engine_bytes'] / 1e6:.1f} MB predicted, SM{entry.device['sm']}")
    small = "".join(f"<small>{escape(line)}</small>" for line in lines)
    return (
        f'<div class="card" style="--c:{colour(entries, entry)}"><b>{escape(entry.title)}</b>'
        f"<small>{escape(str(entry.device['name']))}</small>"
        f'<div class="big">{entry.config.average_bits(entry.model):.2f} bits</div>{small}</div>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: frozenset[int] = frozenset()) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=n' if i in numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(row))

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells("th", head)}</tr>{lines}</table></div>'


def _plans(entries: Sequence[Entry]) -> str:
    rows = []
    for entry in entries:
        plan = entry.plan
        counts = ", ".join(f"{count} × {text}" for text, count in entry.config.counts.items())
        steps = "<br>".join(escape(step) for step in plan.get("next_steps", ()))
        rows.append(
            [
                escape(entry.title),
                f"<code>{entry.config.hash}</code>",
                escape(counts),
                escape(str(plan.get("binds", ""))),
                steps or "–",
            ]
        )
    return (
        "<section id=plans><h2>Why these</h2><p>What limited each choice, and what the next step of that limit would "
        f"buy.</p>{_table(['device', 'configuration', 'matrices', 'binds', 'next step'], rows)}</section>"
    )


def _quality(report: Report) -> str:
    rows = [
        [escape(what), f"{bits:.2f}" if bits is not None else "–", f"{loss:.4f}", f"{math.exp(loss):.2f}"]
        for what, bits, loss in report.quality
        if loss < 50
    ]
    for name, archive in report.archives.items():
        for point in archive.front():
            rows.append(
                [
                    f"{escape(name)}: searched, <code>{point.config.hash}</code>",
                    f"{archive.bits(point):.2f}",
                    f"{point.loss:.4f}",
                    f"{math.exp(point.loss):.2f}",
                ]
            )
    for entry in report.entries:
        measured = entry.plan.get("measured_loss")
        if measured is not None:
            rows.append(
                [
                    f"{escape(entry.title)}: with its LoRA",
                    f"{entry.config.average_bits(entry.model):.2f}",
                    f"{measured:.4f}",
                    f"{math.exp(measured):.2f}",
                ]
            )
    if not rows:
        return ""
    table = _table(["held out", "bits per weight", "nats per token", "perplexity"], rows, frozenset({1, 2, 3}))
    return f"<section id=quality><h2>Quality</h2><p>Measured on held-out data.</p>{table}</section>"


def _provenance(report: Report, command: str) -> str:
    rows = [[escape(what), escape(value)] for what, value in report.training]
    for entry in report.entries:
        value = "; ".join(f"{escape(what)} <code>{escape(text)}</code>" for what, text in entry.provenance)
        rows.append([escape(entry.title), value])
    if report.versions:
        rows.append(["versions", escape(", ".join(f"{name} {text}" for name, text in report.versions.items()))])
    sources = {source for entry in report.entries for source in entry.device.get("sources", ())}
    for source in sorted(sources):
        rows.append(["device figure", escape(source)])
    return (
        f"<section id=provenance><h2>Provenance</h2><p>Hashes, versions, sources of figures, and the command.</p>"
        f"{_table(['what', 'value'], rows)}<pre>{escape(command)}</pre></section>"
    )
