"""A short campaign: mutated inputs of every kind are read, or refused in one line."""

import random
from pathlib import Path

import pytest

from campaigns.mutate import mutate
from campaigns.mutations import KINDS, Campaign

SLOW = ("model.gguf", "model/config.json", "model/generation_config.json", "model/model.safetensors")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("mutations") / "inputs", seed=24)


def test_mutated_inputs_work_or_are_refused_in_one_line(campaign: Campaign) -> None:
    kinds = [kind for kind in campaign.kinds if kind not in SLOW and "tokenizer" not in kind]
    for i in range(130):
        campaign.read(kinds[i % len(kinds)], i // len(kinds))
    for i, kind in enumerate(("configuration.json", "bundle/manifest.json", "adapter/archive.json", "chat.jsonl")):
        campaign.command(kind, i)
    assert campaign.faults == {}
    total = campaign.result()["outcomes"]
    assert total["works"] > 10 and total["refused"] > 50


def test_mutations_change_what_they_are_given_and_come_back_by_their_number() -> None:
    data = b'{"a": [1, {"b": "c"}], "d": 0.5}'
    made = [mutate(random.Random(i), data, ".json") for i in range(300)]
    assert made == [mutate(random.Random(i), data, ".json") for i in range(300)]
    assert len(set(made)) > 200
    assert any(b"NaN" in text for text in made) and any(b"[[[[[" in text for text in made)
    assert {Path(kind).suffix for kind in KINDS} == {".json", ".jsonl", ".safetensors", ".gguf", ".txt"}
