"""The demo's parts: what its table, text and picture say of losses, and that the commands it ends with exist."""

import json
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import demo
import demo_measure
import demo_table
import numpy as np
import pytest
from demo_picture import picture
from scipy.stats import ttest_rel

import coatrt
from coatrt.cli.main import cli

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def losses(seed: int, mean: float, spread: float) -> Any:
    return mean + spread * np.random.default_rng(seed).standard_normal(16)


def rows() -> list[dict[str, Any]]:
    """Two GPUs: on the small one the neighbour's LoRA is clearly worse, on the large one nobody can tell."""
    text = losses(0, 0.0, 0.5)  # blocks differ far more than LoRAs do
    small = {"device": "small", "bits": 2.75, "formats": {"int8": 1, "nf2-g64": 20}, "engine_bytes": 51_000_000}
    large = {"device": "large", "bits": 6.0, "formats": {"int4-g64": 3, "fp16": 2}, "engine_bytes": 110_450_000}
    made = [
        demo_table.result_row(small, 3.7 + text, 4.5 + text, 3.5 + text, {"large": 3.6 + text + losses(1, 0, 0.02)}),
        demo_table.result_row(large, 3.7 + text, 3.8 + text, 3.4 + text, {"small": 3.4 + text + losses(2, 0, 0.02)}),
    ]
    for row in made:
        row["bits_per_matrix"] = {kind: [2.25, 8.0, 4.25] for kind in KINDS}
    return made


def test_differences_are_paired() -> None:
    text = losses(0, 3.5, 0.5)
    others = text + losses(1, 0.1, 0.02)
    mean, error = demo_table.difference(others, text)
    assert mean == pytest.approx(others.mean() - text.mean())
    assert mean / error == pytest.approx(ttest_rel(others, text).statistic)
    assert demo_table.perplexity(text) == pytest.approx(float(np.exp(text.sum() / 16)))


def test_the_table_prints_no_noise() -> None:
    head, small, large, base = demo_table.table(rows(), 42.66).splitlines()
    made = rows()
    assert head.split("  ")[0] == "GPU"
    assert "20 nf2, 1 int8" in small  # the fewest bits first
    assert small.split()[-1] == f"{made[0]['neighbours'][0]['perplexity']:.1f}"
    assert small.split()[-2] == f"{made[0]['with']:.1f}"
    assert f"{made[0]['without']:.1f}" in small.split()
    assert "51.0" in small.split()
    assert large.split()[-1] == "level"
    assert "3 int4, 2 fp16" in large
    assert base.split() == ["fp16", "base", "16.00", "42.7"]
    assert max(map(len, (head, small, large, base))) <= 120


def test_what_was_found_names_the_neighbours_that_are_behind() -> None:
    made = rows()
    said = " ".join(demo_table.found(made, 42.7, 2032))
    assert f"large does less for it: {made[0]['neighbours'][0]['perplexity']:.1f}" in said
    assert "2,032 tokens" in said
    assert demo_table.beaten(made[1]) == []


def test_the_picture_shows_every_gpu_and_number() -> None:
    made = rows()
    svg = picture({"rows": made, "fp16_perplexity": 42.7, "tokens": 2032})
    texts = ["".join(node.itertext()) for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"small, 2.75 bits per weight", "large, 6.00 bits per weight", "LoRA of large", "LoRA of small"} <= {*texts}
    assert f"{made[0]['with']:.1f}" in texts
    assert f"{made[0]['neighbours'][0]['perplexity']:.1f}" in texts
    assert "level with own" in texts
    assert svg == picture({"rows": made, "fp16_perplexity": 42.7, "tokens": 2032})  # the same file for the same result


def test_the_commands_it_ends_with_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = cli.make_context("coatrt", [], resilient_parsing=True)
    for _, arguments in demo.next_commands(tmp_path):
        command = cli.get_command(group, arguments[0])
        assert command is not None
        with command.make_context(arguments[0], arguments[1:], parent=group):  # refuses an unknown option or value
            pass
        for option, value in pairwise(arguments):
            assert option != "--target" or coatrt.device_profile(value).id == value
    program = tmp_path / "environment" / "coatrt"
    program.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    assert demo.shown(["run", "a b"]) == f"{program.with_name('python')} -m coatrt run 'a b'"
    program.touch()
    assert demo.shown(["run", "a b"]) == "environment/coatrt run 'a b'"


class Evaluator:
    """Counts what is measured."""

    calls = 0

    def __init__(self, adapter: object) -> None:
        pass

    def example_losses(self, config: Any, data: object, lora: object) -> Any:
        type(self).calls += 1
        return np.array([1.0, 2.0, float(config.hash)])


def test_measurements_go_on_after_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coatrt, "Evaluator", Evaluator, raising=False)
    path, adapter, data = tmp_path / "m.json", SimpleNamespace(), SimpleNamespace(digest="text")
    configs = [SimpleNamespace(hash=str(i)) for i in range(3)]
    first = demo_measure.Measurements(path, adapter, data)  # type: ignore[arg-type]
    assert [first.losses(config).tolist() for config in configs[:2]] == [[1, 2, 0], [1, 2, 1]]
    again = demo_measure.Measurements(path, adapter, data)  # type: ignore[arg-type]
    assert [again.losses(config).tolist() for config in configs] == [[1, 2, 0], [1, 2, 1], [1, 2, 2]]
    assert (first.new, again.new, Evaluator.calls) == (2, 1, 3)
    other = demo_measure.Measurements(path, adapter, SimpleNamespace(digest="other text"))  # type: ignore[arg-type]
    other.losses(configs[0])
    assert other.new == 1
    assert len(json.loads(path.read_text())) == 4
    assert list(tmp_path.iterdir()) == [path]
    path.write_text("{")
    with pytest.raises(coatrt.CoatError, match=r"m\.json is damaged; remove it and run again"):
        demo_measure.Measurements(path, adapter, data)  # type: ignore[arg-type]


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "NEEDED", ("json", "no_such_package", "none_such"))
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    with pytest.raises(SystemExit) as caught:
        demo.main()
    assert caught.value.code == 2
    said = "demo: not installed: no_such_package, none_such; run make demo, which installs everything needed\n"
    assert capsys.readouterr().err == said


@pytest.mark.smollm
def test_no_message_is_both_trained_on_and_held_out() -> None:
    texts, held_out = demo.speeches()
    assert not {*texts} & {*held_out}
    assert len(texts) > 8 * len(held_out) > 80
    assert all(path.is_file() for path in (*texts, *held_out))
