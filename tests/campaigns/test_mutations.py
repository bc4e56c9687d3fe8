"""A short campaign: mutated inputs of every kind are read, or refused in one line."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from campaigns.inputs import reseal, seal_again
from campaigns.mutate import mutate
from campaigns.mutations import COMMANDS, KINDS, Campaign, run_command
from coatrt.errors import CoatError
from coatrt.planning.measured_latency import timings_path
from coatrt.training.resume_state import check_state

SLOW = ("model.gguf", "model/config.json", "model/generation_config.json", "model/model.safetensors")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("mutations") / "inputs", seed=24)


def test_mutated_inputs_work_or_are_refused_in_one_line(campaign: Campaign) -> None:
    kinds = [kind for kind in campaign.kinds if kind not in SLOW]
    for i in range(130):
        campaign.read(kinds[i % len(kinds)], i // len(kinds))
    for i, kind in enumerate(("configuration.json", "bundle/manifest.json", "adapter/archive.json", "chat.jsonl")):
        campaign.command(kind, i)
    assert campaign.faults == {}
    total = campaign.result()["outcomes"]
    assert total["works"] > 5 and total["refused"] > 50


PLAN = {"binds": "x", "memory_bytes": {}}
DAMAGED: dict[str, tuple[str, Callable[[Any], Any], str, str]] = {
    # file, its JSON → what it holds now, the command that reads it, what is said
    "no stop tokens": ("bundle/manifest.json", lambda m: without(m, "model", "stop_tokens"), "run", "stop_tokens"),
    "no device": ("bundle/manifest.json", lambda m: without(m, "device", "name"), "report-bundle", "device in"),
    "hypernet no JSON": ("bundle/hypernet.json", lambda _: "{", "adapt", "hypernet.json is not JSON"),
    "hypernet a list": ("bundle/hypernet.json", lambda _: [], "adapt", "hypernet.json is garbled"),
    "fewer matrices": (
        "bundle/hypernet.json",
        lambda h: {**h, "matrices": h["matrices"][:-1]},
        "adapt",
        "does not match its contract",
    ),
    "plan null": ("bundle/plan.json", lambda _: None, "report-bundle", "plan.json"),
    "plan of little": ("bundle/plan.json", lambda _: PLAN, "report-bundle", "plan.json"),
    "plan of no memory": (
        "bundle/plan.json",
        lambda p: {**p, "memory_bytes": {}},
        "report-bundle",
        "must have weights",
    ),
    "plan of no time": ("bundle/plan.json", lambda p: {**p, "decode_seconds": -1}, "report-bundle", "negative"),
    "contract": ("bundle/lora_io.json", lambda c: renamed(c), "adapt", "does not match its contract"),
    "contract to run": ("bundle/lora_io.json", lambda c: renamed(c), "run", "cpu.onnx has no input another"),
    "deep": ("configuration.json", lambda _: "[" * 100000, "adapt", "configuration.json is not JSON"),
    "archive a list": ("adapter/archive.json", lambda _: [], "plan", "archive.json has no seal"),
    "timings twice": ("cpu.json", lambda t: {**t, "products": t["products"] * 2}, "plan-cpu", "hold an entry twice"),
    "timings null": ("cpu.json", lambda _: None, "plan-cpu", "cpu-ort.json"),
}


def without(value: Any, *path: str) -> Any:
    del value[path[0]][path[1]]
    return value


def renamed(contract: Any) -> Any:
    contract["tensors"][3]["A"] = "another"  # of a matrix that reads alone: its tensor is an input of the graph
    return contract


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_inputs_are_one_line_of_a_command(case: str, campaign: Campaign) -> None:
    kind, change, name, said = DAMAGED[case]
    made = change(json.loads((campaign.whole / kind).read_text()))
    target = timings_path("cpu") if kind == "cpu.json" else campaign.work / kind
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(made if isinstance(made, str) else json.dumps(made))
    parts = Path(kind).parts
    if kind == "cpu.json":
        seal_again(target)
    elif len(parts) > 1:
        reseal(campaign.work / parts[0], str(Path(*parts[1:])))
    try:
        with pytest.raises(CoatError, match=re.escape(said)):
            run_command(COMMANDS[name].format(here=campaign.work).split())
    finally:
        campaign.restore(kind)
        if kind == "cpu.json":
            target.unlink()


def test_a_training_state_of_another_type_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(CoatError, match=r"run\.json has no seal"):
        check_state(tmp_path, "x")


def test_mutations_change_what_they_are_given_and_come_back_by_their_number() -> None:
    data = b'{"a": [1, {"b": "c"}], "d": 0.5}'
    made = [mutate(random.Random(i), data, ".json") for i in range(300)]
    assert made == [mutate(random.Random(i), data, ".json") for i in range(300)]
    assert len(set(made)) > 200
    assert any(b"NaN" in text for text in made) and any(b"[[[[[" in text for text in made)
    assert {Path(kind).suffix for kind in KINDS} == {".json", ".jsonl", ".safetensors", ".gguf", ".txt"}
