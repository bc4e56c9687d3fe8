"""Reports: one page that needs nothing else, with every figure and every hash in it."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from coatrt.adapter.description import AdapterDescription
from coatrt.bundle import Bundle
from coatrt.devices.profiles import device_profile
from coatrt.errors import BundleError, ConfigError
from coatrt.planning import planner
from coatrt.planning.plan import PlanRequest
from coatrt.reporting.collect import collect
from coatrt.reporting.figures import FIGURES, draw
from coatrt.reporting.write import page
from support.bundles import make_bundle

REQUEST = PlanRequest(bits=5.5, context=64)


class Outline(HTMLParser):
    """Counts open elements and gathers text, ids and whatever would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [str(values["id"])] if tag == "section" else []
        self.loads += [str(values[key]) for key in ("src", "href") if values.get(key) and values[key][0] != "#"]  # type: ignore[index]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Nothing stays open."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_of_plans_holds_every_figure_and_loads_nothing(tiny_adapter: Path) -> None:
    names = ("t4", "rtx-3060", "rtx-5090")
    report = collect([tiny_adapter], names, REQUEST)
    facts = AdapterDescription.load(tiny_adapter)
    outline = Outline()
    text = page(report, "coatrt report <here>")
    outline.feed(text)
    assert outline.open == []
    assert not [load for load in outline.loads if "w3.org" not in load]
    assert outline.ids == [*FIGURES, "plans", "quality", "provenance"]
    assert text.count("<svg") == len(FIGURES)
    for entry in report.entries:
        plan = planner.plan(facts, device_profile(entry.title), REQUEST)
        assert entry.config == plan.config
        assert plan.config.hash in outline.text
        assert f"{plan.average_bits:.2f} bits" in outline.text
    assert facts.hash in outline.text
    assert "coatrt report <here>" in outline.text
    losses = facts.metrics["held_out"]
    assert f"{losses['full_precision']:.4f}" in outline.text


def test_bundles_show_their_engines_and_hashes(tiny_bundle_copy: Path) -> None:
    report = collect([tiny_bundle_copy.parent], (), REQUEST)
    (entry,) = report.entries
    bundle = Bundle.open(tiny_bundle_copy)
    assert entry.config == bundle.config
    assert entry.engine_bytes is None
    text = page(report, "x")
    assert bundle.manifest["files"]["weights.bin"]["sha256"][:16] in text
    assert "NVIDIA Ada" in text or "RTX 4090" in text
    plan = json.loads((tiny_bundle_copy / "plan.json").read_text())
    assert f"{plan['average_bits']:.2f} bits" in text
    (tiny_bundle_copy / "plan.json").write_text("{}")
    with pytest.raises(BundleError):
        collect([tiny_bundle_copy], (), REQUEST)


@pytest.fixture
def tiny_bundle_copy(tiny_adapter: Path, tmp_path: Path) -> Path:
    from coatrt.adapter.adapter import Adapter
    from coatrt.engines.bundles.options import BundleOptions

    adapter, profile = Adapter.from_pretrained(tiny_adapter), device_profile("rtx-4090")
    plan = planner.plan(adapter.description, profile, bits=5.2, context=64)
    place = tmp_path / "bundles" / "rtx-4090"
    options = BundleOptions(context=64, engine=False)
    make_bundle(adapter, plan.config, profile.id, place, options, plan=plan)
    return place


def test_text_from_outside_is_shown_and_not_read_as_html(tiny_adapter: Path) -> None:
    report = collect([tiny_adapter], ("rtx-3060",), REQUEST)
    entry = replace(report.entries[0], title="<i>&", plan={**report.entries[0].plan, "next_steps": ["a < b", "c & d"]})
    outline = Outline()
    outline.feed(page(replace(report, entries=(entry,), source="models/<b>"), "coatrt"))
    assert outline.open == []
    assert "coatrt: <b>" in outline.text and "<i>&" in outline.text and "a < bc & d" in outline.text


def test_accuracies_stand_beside_losses(tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = AdapterDescription.load(tiny_adapter)
    assert "accuracy</th>" not in page(collect([tiny_adapter], ("rtx-3060",), REQUEST), "coatrt")
    row = {"bits": 5.0, "without": 3.0, "without_accuracy": 0.25, "adapted": 2.0, "adapted_accuracy": 0.75}
    held_out = {"full_precision": 1.0, "full_precision_accuracy": 0.5, "budgets": [row]}
    choice = replace(facts, metrics={**facts.metrics, "held_out": held_out})
    monkeypatch.setattr(AdapterDescription, "load", lambda path: choice)
    report = collect([tiny_adapter], ("rtx-3060",), REQUEST)
    assert [(row.bits, row.loss, row.accuracy) for row in report.quality] == [(16, 1, 0.5), (5, 3, 0.25), (5, 2, 0.75)]
    text = page(report, "coatrt")
    assert "accuracy</th>" in text and '<td class="n">0.750</td>' in text


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, coatrt.reporting.write, coatrt.cli.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_figures_as_png_and_repeatable_svg(tiny_adapter: Path) -> None:
    report = collect([tiny_adapter], ("rtx-3060", "cpu"), REQUEST)  # nothing is known of the CPU's speed
    for name in FIGURES:
        assert draw(name, report, "png").startswith(b"\x89PNG")
        first, second = (draw(name, report, "svg").decode() for _ in range(2))
        assert first == second
        assert re.search(r"<svg [^>]*viewBox", first)


def test_wrong_paths(tmp_path: Path, tiny_adapter: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter, no bundle"):
        collect([tmp_path], (), REQUEST)
    with pytest.raises(ConfigError, match="nothing to show"):
        collect([tiny_adapter], (), REQUEST)
