"""Training and search on a device beside the CPU: no operand is left behind, and losses are the CPU's."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.programs import run_program

TEXTS = [f"the {word} sat on the mat and the {word} saw the hen. " * 30 for word in ("cat", "owl", "fox")]

_PROGRAM = """
import json, sys
import torch
import coatrt.adapter.adapter, coatrt.searching.run, coatrt.training.run
from support import pretend_device
from support.tiny import text_data, tiny_options

torch.set_num_threads(1)
for module in (coatrt.training.run, coatrt.adapter.adapter):
    module.compute_device = torch.device
llama, directory, texts, changes = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
said = {}
for device in ("cpu", pretend_device.NAME):
    place = f"{directory}/{device}"
    data = text_data(llama, texts)
    seen = []

    def note(done, total, stage, text=""):
        if stage == "training":
            seen.append(len(pretend_device.waits))

    adapter = coatrt.training.run.train(llama, data, place, tiny_options(**changes), device=device, progress=note)
    found, _ = coatrt.searching.run.search(place, data, evaluations=2, blocks=2, device=device)
    said[device] = {"losses": adapter.description.metrics["losses"], "measured": [entry.loss for entry in found]}
    said[device]["waits"] = [later - earlier for earlier, later in zip(seen, seen[1:])]
try:
    torch.ones(3, device=pretend_device.NAME) + torch.ones(3)
except RuntimeError as error:
    said["refusal"] = str(error)
print(json.dumps(said))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {
            "preset": "coatrt",
            "quantizer": "refined",
            "budgets": (4.0, 6.0),
            "learning_rate": 1e-3,
        },
        {"preset": "paper", "precision": "bfloat16", "accumulate": 2, "learning_rate": 1e-3},
        {"preset": "none", "compensation": False},
    ],
)
def test_losses_on_another_device_are_the_cpus(tiny_llama: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    texts, steps = json.dumps(TEXTS), json.dumps({**changes, "steps": 4, "checkpoint_every": 4})
    done = run_program(_PROGRAM, tiny_llama, tmp_path, texts, steps)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["refusal"] == "aten::add is given (3,) of cpu beside tensors of pretend:0"  # the device is strict
    tolerance = 0.01 if "precision" in changes else 1e-3
    assert len(said["cpu"]["losses"]) == 4
    for mine, expected in zip(said["pretend"]["losses"], said["cpu"]["losses"], strict=True):
        assert mine == pytest.approx(expected, rel=tolerance)
    # Once a step for the losses, and once a pass transformers asks whether rows are packed.
    assert all(1 <= count <= 1 + 2 * changes.get("accumulate", 1) for count in said["pretend"]["waits"])
    assert said["pretend"]["measured"] == pytest.approx(said["cpu"]["measured"], rel=tolerance)
