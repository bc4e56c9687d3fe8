"""Reports: one page that needs nothing else, whose numbers are those of the files."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from math import exp
from pathlib import Path
from typing import Any

import pytest

from coatrt.adapter.description import AdapterDescription
from coatrt.bundle import Bundle
from coatrt.devices.profiles import device_profile
from coatrt.errors import BundleError, ConfigError
from coatrt.planning import planner
from coatrt.planning.plan import PlanRequest
from coatrt.reporting import figures
from coatrt.reporting.collect import Report, collect
from coatrt.reporting.figures import FIGURES, draw, figure_names
from coatrt.reporting.measured import Quality, bench_path, quality_path, save_quality
from coatrt.reporting.write import page
from support.bundles import make_bundle

REQUEST = PlanRequest(bits=5.5, context=64)
SCORES: Any = ({"loss": 3.75}, {"loss": 4.0}, {"loss": 3.5})
QUALITY = Quality("text", 24, 3048, *SCORES)
CHOICE: Any = ({"loss": 3.0, "accuracy": 0.5}, {"loss": 4.0, "accuracy": 0.25}, {"loss": 2.0, "accuracy": 0.75})


class Page(HTMLParser):
    """What a page holds: text, what it would load, and the rows of its tables: their cells, and which are hatched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.rows: list[dict[str, str]] = []
        self.hatched: set[str] = set()
        self._cell = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.ids += [values["id"]] if tag in ("section", "details") else []
        links = [values[key] for key in ("src", "href", "xlink:href", "srcset") if key in values]
        self.loads += [link for link in links if not link.startswith("#")] + [tag] * (tag in ("script", "link", "img"))
        if tag == "tr":
            self.rows.append({})
        if tag in ("td", "th") and self.rows:
            self._cell = values.get("data-label", "name")
            self.rows[-1][self._cell] = ""
        if values.get("class") == "assumed" and self._cell:
            self.hatched.add(f"{len(self.rows) - 1} {self._cell}")
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Nothing stays open."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._cell = "" if tag in ("td", "th") else self._cell

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.rows[-1][self._cell] += data.strip()

    def row(self, name: str) -> tuple[dict[str, str], set[str]]:
        """Return the first row whose name holds a text, and the heads of its hatched cells."""
        number = next(i for i, row in enumerate(self.rows) if name in row.get("name", ""))
        return self.rows[number], {mark.partition(" ")[2] for mark in self.hatched if mark.split()[0] == str(number)}


@pytest.fixture(scope="module")
def made(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from coatrt.adapter.adapter import Adapter
    from coatrt.engines.bundles.options import BundleOptions

    adapter, profile = Adapter.from_pretrained(tiny_adapter), device_profile("rtx-4090")
    plan = planner.plan(adapter.description, profile, bits=5.2, context=64)
    place = tmp_path_factory.mktemp("bundles") / "rtx-4090"
    make_bundle(adapter, plan.config, profile.id, place, BundleOptions(context=64, engine=False), plan=plan)
    return place


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "bundles" / "rtx-4090"))


def bench(configuration: str, backend: str, gpus: list[str]) -> dict[str, Any]:
    """Return the part of a benchmark that a report reads."""
    return {
        "bundle": {"configuration": configuration},
        "backend": {"backend": backend, "batch": 2},
        "decode": [{"lora": True, "tokens_per_s": 246.8}, {"lora": False, "tokens_per_s": 250.0}],
        "environment": {"cpu": "A CPU", "gpus": gpus},
        "lora_overhead": -0.109,
        "lora_overhead_interval": [-0.2, 0.15],
        "repetitions": 5,
    }


def test_a_page_of_plans_needs_nothing_else_and_hatches_what_is_predicted(tiny_adapter: Path) -> None:
    names = ("t4", "rtx-3060")
    report = collect([tiny_adapter], names, REQUEST)
    facts = AdapterDescription.load(tiny_adapter)
    text = page(report, "coatrt report <here>")
    found = Page(text)
    assert found.loads == []
    assert not re.search(r"@import|url\((?!['\"]?#)|http-equiv", text)
    assert len(text) < 1_000_000
    assert text.count("<svg") == len(FIGURES)
    assert found.ids == ["devices", "quality", "memory", "speed", "bits", "choices", "provenance"]
    for name, shown in zip(names, ("T4", "RTX 3060"), strict=True):
        plan = planner.plan(facts, device_profile(name), REQUEST)
        row, hatched = found.row(shown)
        assert row["Bits per weight"] == f"{plan.average_bits:.2f}"
        assert row["Size"] == f"≈ {float(f'{plan.engine_bytes / 1e6:.2g}')} MB"
        assert plan.limit_bytes and row["Memory in use"] == (
            f"≈ {plan.total_bytes / 2**30:.1f} GiB of {plan.limit_bytes / 2**30:.0f} GiB"
        )
        assert plan.tokens_per_second is not None
        assert row["Speed"] == f"≈ {float(f'{plan.tokens_per_second:.2g}'):,.0f} tokens/s"
        assert hatched == {"Size", "Memory in use", "Speed"}
        assert plan.config.hash in found.text
    original, hatched = found.row("16-bit original")
    assert original["Size"] == f"{(2 * facts.model.parameters + facts.model.other_bytes) / 1e6:.3f} MB"
    assert not hatched
    assert facts.hash in found.text and "coatrt report <here>" in found.text
    budget = facts.metrics["held_out"]["budgets"][0]
    assert f"{exp(budget['without']):,.1f}" in found.text


def test_rows_turn_to_cards_on_a_phone(tiny_adapter: Path) -> None:
    text = page(collect([tiny_adapter], ("t4",), REQUEST), "")
    assert '<meta name="viewport" content="width=device-width,initial-scale=1">' in text
    narrow = text[text.index("@media (max-width:760px)") :]
    assert re.search(r"\.cards tr,[^}]*display:block", narrow)
    assert "content:attr(data-label)" in narrow
    cells = re.findall(r"<td[^>]*>", text[text.index("<tbody>") :])
    assert cells and all("data-label" in cell for cell in cells)
    assert "prefers-color-scheme:dark" in text


def test_devices_of_one_configuration_share_a_row(tiny_adapter: Path) -> None:
    report = collect([tiny_adapter], ("rtx-3060", "rtx-3090", "l4"), PlanRequest(context=64))
    assert len({entry.config.hash for entry in report.entries}) == 1
    found = Page(page(report, ""))
    row, _ = found.row("RTX 3060")
    assert row["name"] == "RTX 3060, RTX 3090 and L4"
    assert row["Memory in use"].endswith("of 12–24 GiB")
    speeds = [1 / entry.plan["decode_seconds"] for entry in report.entries]
    span = dict.fromkeys(f"{float(f'{speed:.2g}'):,.0f}" for speed in sorted(speeds))
    assert row["Speed"] == f"≈ {'–'.join(span)} tokens/s"
    assert [row["name"] for row in found.rows].count("RTX 3060, RTX 3090 and L4") == 2  # at the top, and why


def test_measured_quality_stands_against_the_original(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert save_quality(opened, QUALITY) == bundle.with_name("rtx-4090.quality.json")
    assert opened.check_all()  # it lies beside the bundle, not in it
    found = Page(page(collect([bundle.parent], (), REQUEST), ""))
    row, hatched = found.row("RTX 4090")
    change = 100 * (exp(0.25) - 1), 100 * (1 - exp(-0.25))
    assert row["Perplexity without LoRA"] == f"{exp(4.0):.1f} (+{change[0]:.0f} %)"
    assert row["Perplexity with its LoRA"] == f"{exp(3.5):.1f} (−{change[1]:.0f} %)"
    assert hatched == {"Size", "Memory in use", "Speed"}
    assert found.row("16-bit original")[0]["Perplexity"] == f"{exp(3.75):.1f}"
    assert f"{change[1]:.0f} % below that of the 16-bit original" in found.text
    assert "24 blocks of text (3,048 tokens)" in found.text
    plan = json.loads((bundle / "plan.json").read_text())
    assert row["Bits per weight"] == f"{plan['average_bits']:.2f}"
    assert opened.manifest["files"]["weights.bin"]["sha256"][:16] in found.text


def test_quality_of_the_same_configuration_holds_for_other_devices(bundle: Path, tiny_adapter: Path) -> None:
    save_quality(Bundle.open(bundle), QUALITY)
    request = PlanRequest(bits=5.2, context=64)
    report = collect([tiny_adapter, bundle], ("l4", "rtx-4090"), request)
    assert [entry.title for entry in report.entries] == ["rtx-4090", "l4"]  # the bundle stands for its device's plan
    assert [entry.quality for entry in report.entries] == [QUALITY, QUALITY]
    assert Page(page(report, "")).row("RTX 4090")[0]["name"] == "RTX 4090 and L4"


def test_quality_of_an_earlier_build_is_left_out_and_said(bundle: Path) -> None:
    path = save_quality(Bundle.open(bundle), QUALITY)
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "weights": "0" * 64}))
    report = collect([bundle], (), REQUEST)
    assert report.entries[0].quality is None
    assert "rtx-4090.quality.json was measured with an earlier build" in Page(page(report, "")).text
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        collect([bundle], (), REQUEST)
    value["quality"]["adapted"]["accuracy"] = 0.5
    path.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match="accuracy"):
        collect([bundle], (), REQUEST)


def test_accuracies_have_their_interval(bundle: Path) -> None:
    save_quality(Bundle.open(bundle), Quality("choice", 8, 8, *CHOICE))
    found = Page(page(collect([bundle], (), REQUEST), ""))
    row, _ = found.row("RTX 4090")
    assert row["Right answers without LoRA"] == "25 % (7–59 %)"  # Wilson's interval, as scipy has it
    assert row["Right answers with its LoRA"] == "75 % (41–93 %)"


def test_a_speed_is_that_of_the_device_only_where_it_was_measured_on_it(bundle: Path) -> None:
    hash = Bundle.open(bundle).config.hash

    def shown(backend: str, gpus: list[str]) -> tuple[str, bool, str]:
        bench_path(bundle).write_text(json.dumps(bench(hash, backend, gpus)))
        found = Page(page(collect([bundle], (), REQUEST), ""))
        row, hatched = found.row("RTX 4090")
        return row["Speed"], "Speed" in hatched, found.text

    speed, predicted, text = shown("cuda", ["GeForce RTX 4090"])
    assert (speed, predicted) == ("123 tokens/s", False)  # of each of two sequences
    assert "within noise" in text and "-10.9" not in text
    for backend, gpus in (("ort", ["GeForce RTX 4090"]), ("cuda", ["NVIDIA H100"])):
        speed, predicted, _ = shown(backend, gpus)
        assert speed.startswith("≈") and predicted
    bench_path(bundle).write_text(json.dumps(bench("0" * 16, "cuda", ["GeForce RTX 4090"])))
    assert "another configuration" in collect([bundle], (), REQUEST).notes[0]


def test_bars_are_hatched_where_they_are_predicted(bundle: Path) -> None:
    hash = Bundle.open(bundle).config.hash
    assert "<pattern" in draw("speed", collect([bundle], (), REQUEST), "svg").decode()
    bench_path(bundle).write_text(json.dumps(bench(hash, "trt", ["GeForce RTX 4090"])))
    assert "<pattern" not in draw("speed", collect([bundle], (), REQUEST), "svg").decode()


def test_figures_show_what_the_files_say(bundle: Path) -> None:
    from matplotlib.figure import Figure

    save_quality(Bundle.open(bundle), QUALITY)
    report = collect([bundle], (), REQUEST)
    figure = Figure()
    figures.quality_figure(figure, report)
    lines = {str(line.get_label()): line.get_ydata() for line in figure.axes[0].get_lines()}
    assert lines["without the LoRA"] == pytest.approx([100 * (exp(0.25) - 1)])
    assert lines["with its LoRA"] == pytest.approx([100 * (exp(-0.25) - 1)])
    figure = Figure()
    figures.memory_figure(figure, report)
    widths = [bar.get_width() * 2**20 for bar in figure.axes[0].patches]  # type: ignore[attr-defined]
    assert widths == pytest.approx(list(report.entries[0].plan["memory_bytes"].values()))


def test_the_figure_of_quality_joins_points_of_one_sample_only(bundle: Path, tiny_adapter: Path) -> None:
    save_quality(Bundle.open(bundle), QUALITY)
    report = collect([tiny_adapter, bundle], (), REQUEST)
    ((bits, budget),) = ((bits, quality) for training in report.trained for bits, _, quality in training.budgets)
    shown = [quality for _, quality in figures._points(report)]
    assert shown == [QUALITY] and budget.sample != QUALITY.sample  # the bundle's sample, though training has another
    same = replace(QUALITY, **{name: getattr(budget, name) for name in ("task", "examples", "tokens", "base")})
    entries = [replace(entry, quality=same) for entry in report.entries if entry.quality == QUALITY]
    both = figures._points(replace(report, entries=tuple(entries)))
    assert [place for place, _ in both] == sorted([bits, entries[0].bits])


def test_text_from_outside_is_shown_and_not_read_as_html(tiny_adapter: Path) -> None:
    report = collect([tiny_adapter], ("rtx-3060",), REQUEST)
    entry = replace(report.entries[0], title="<i>&", plan={**report.entries[0].plan, "next_steps": ["a < b", "c & d"]})
    found = Page(page(replace(report, entries=(entry,), title="models/<b>"), "coatrt"))
    assert "models/<b>: coatrt report" in found.text and "(<i>&)" in found.text and "a < bc & d" in found.text


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("/models/SmolLM2-135M", "SmolLM2-135M"),
        ("/models/smollm2.gguf", "smollm2"),
        ("/cache/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/12fd25f", "HuggingFaceTB/SmolLM2-135M"),
    ],
)
def test_the_model_has_the_name_that_its_user_gave_it(source: str, name: str, tiny_adapter: Path) -> None:
    report: Report = replace(collect([tiny_adapter], ("t4",), REQUEST), source=source)
    assert f"<h1>{name}</h1>" in page(report, "")


def test_matplotlib_is_imported_only_to_draw(tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, coatrt.reporting.write, coatrt.cli.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="extra report"):
        draw("bits", collect([tiny_adapter], ("t4",), REQUEST), "png")


def test_figures_as_png_and_repeatable_svg(tiny_adapter: Path) -> None:
    report = collect([tiny_adapter], ("rtx-3060", "cpu"), REQUEST)  # nothing is known of the CPU's speed
    assert figure_names(report) == list(FIGURES)
    assert draw("bits", report, "png").startswith(b"\x89PNG")
    for name in FIGURES:
        first, second = (draw(name, report, "svg").decode() for _ in range(2))
        assert first == second
        assert re.search(r"<svg [^>]*viewBox", first)


def test_wrong_paths(tmp_path: Path, tiny_adapter: Path, bundle: Path) -> None:
    with pytest.raises(ConfigError, match="not an adapter, a bundle"):
        collect([tmp_path / "none"], (), REQUEST)
    with pytest.raises(ConfigError, match="nothing to show"):
        collect([tiny_adapter], (), REQUEST)
    (bundle / "plan.json").write_text("{}")
    with pytest.raises(BundleError):
        collect([bundle], (), REQUEST)


def test_several_models_are_refused(bundle: Path, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(AdapterDescription.load(tiny_adapter), fingerprint="another", source="other")
    monkeypatch.setattr(AdapterDescription, "load", lambda path: other)
    with pytest.raises(ConfigError, match="different models"):
        collect([tiny_adapter, bundle], (), REQUEST)


def test_a_quality_lies_beside_a_bundle_however_its_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "l4").mkdir()
    monkeypatch.chdir(tmp_path / "l4")
    assert quality_path(".") == quality_path(tmp_path / "l4") == tmp_path / "l4.quality.json"
