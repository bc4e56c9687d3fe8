"""Searching an adapter: losses recomputed with the emitted LoRA, resumed, and used by the plan."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from coatrt.adapter.adapter import Adapter
from coatrt.cli.main import cli
from coatrt.data.examples import Examples
from coatrt.data.registry import load_task
from coatrt.errors import ConfigError
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.models.checkpoint import Checkpoint
from coatrt.models.tokenizer import load_tokenizer
from coatrt.planning.archive import Archive, adapter_archive
from coatrt.quantization.code_cache import CodeStore
from coatrt.searching.run import search
from coatrt.training.run import train
from support.programs import run_program
from support.seals import alter_sealed
from support.tiny import lora_elements, text_data, tiny_options

TEXT = ["the cat sat on the mat and the owl sat on the hen. " * 30]


@pytest.fixture
def directory(tiny_adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))


def test_losses_are_those_of_the_emitted_lora(directory: Path, tiny_llama: Path) -> None:
    assert adapter_archive(directory) is None
    facts = {"blocks": 3}
    search(directory, text_data(tiny_llama, TEXT, TEXT), evaluations=4, **facts)
    archive, reference = search(directory, text_data(tiny_llama, TEXT, TEXT), evaluations=10, **facts)
    found = adapter_archive(directory)
    assert found is not None
    assert found.entries == archive.entries
    assert len(found) == 10
    adapter, checkpoint = Adapter.from_pretrained(directory), Checkpoint.open(tiny_llama)
    lora = 2 * lora_elements(adapter.description.model)
    assert reference[1] == pytest.approx(math.log(272))
    assert reference[0] == pytest.approx(
        adapter.description.space.max_bits + 8 * lora / adapter.description.model.parameters
    )
    blocks = text_data(tiny_llama, TEXT, TEXT).held_out.tokens
    picked = torch.stack([blocks[0], blocks[round((len(blocks) - 1) / 2)], blocks[-1]])
    model = FakeQuantModel(checkpoint, CodeStore(checkpoint))
    for entry in (found.entries[0], found.entries[-1]):
        model.set_config(entry.config)
        model.set_lora(adapter.description.contract, adapter.emit(entry.config))
        with torch.no_grad():
            assert model.loss(Examples.of_blocks(picked)).item() == pytest.approx(entry.loss, rel=1e-4)
        assert entry.nbytes == entry.config.nbytes(adapter.description.model) + lora


def test_losses_are_those_of_the_adapters_own_codes(tiny_llama: Path, tmp_path: Path) -> None:
    options = tiny_options(formats=("nf2-g32", "int8"), preset="none", quantizer="feedback", budgets=(4.0,), steps=1)
    adapter = train(tiny_llama, text_data(tiny_llama, TEXT), tmp_path / "a", options)
    archive, _ = search(tmp_path / "a", text_data(tiny_llama, TEXT, TEXT), evaluations=2, blocks=3)
    blocks = text_data(tiny_llama, TEXT, TEXT).held_out.tokens
    picked = torch.stack([blocks[0], blocks[round((len(blocks) - 1) / 2)], blocks[-1]])
    checkpoint = Checkpoint.open(tiny_llama)
    entry = min(archive.entries, key=lambda entry: entry.nbytes)
    losses = []
    for quantizer in ("feedback", "mse"):
        model = FakeQuantModel(checkpoint, CodeStore(checkpoint, quantizer, adapter.calibration))
        model.set_config(entry.config)
        model.set_lora(adapter.description.contract, adapter.emit(entry.config))
        with torch.no_grad():
            losses.append(model.loss(Examples.of_blocks(picked)).item())
    assert losses[0] == pytest.approx(entry.loss, rel=1e-4)
    assert losses[1] != pytest.approx(entry.loss, rel=1e-3)


def test_losses_of_another_task_are_those_of_its_marked_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"is {i} even?", "choices": [" yes", " no"], "answer": i % 2} for i in range(40)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer = load_tokenizer(tiny_llama)
    data = load_task("choice", [tmp_path / "q.jsonl"], tokenizer, 32)
    options = tiny_options(formats=("int4-g32", "int8"), preset="none", budgets=(5.0,), steps=1, precision="bfloat16")
    adapter = train(tiny_llama, data, tmp_path / "a", options)
    with pytest.raises(ConfigError, match="the data must be of the adapter's task, choice, got text"):
        search(tmp_path / "a", text_data(tiny_llama, TEXT, TEXT), evaluations=2)
    command = ["search", str(tmp_path / "a"), "--data", str(tmp_path / "q.jsonl"), "--evaluations", "2"]
    said = CliRunner().invoke(cli, command)
    assert said.exit_code == 0, (said.output, said.exception)
    archive = adapter_archive(tmp_path / "a")
    assert archive is not None
    held_out = load_task("choice", [tmp_path / "q.jsonl"], tokenizer, 32, held_out=[tmp_path / "q.jsonl"]).held_out
    assert len(held_out) == 40  # all of them: fewer than 64
    checkpoint = Checkpoint.open(tiny_llama)
    model = FakeQuantModel(checkpoint, CodeStore(checkpoint), dtype=torch.bfloat16)
    for entry in archive.entries:
        model.set_config(entry.config)
        model.set_lora(adapter.description.contract, adapter.emit(entry.config))
        with torch.no_grad():
            assert model.loss(held_out).item() == pytest.approx(entry.loss, rel=1e-3)


def test_a_second_search_at_once_is_refused(directory: Path, tiny_llama: Path) -> None:
    said: list[str] = []

    def begin_another(*_: object) -> None:
        said.append(run_program(_SEARCH, directory, tiny_llama).stdout)

    archive, _ = search(directory, text_data(tiny_llama, TEXT, TEXT), evaluations=2, blocks=2, progress=begin_another)
    assert said == ["adapter is in use by another training or search; wait until it ends\n"] * 2
    assert len(archive) == 2
    search(directory, text_data(tiny_llama, TEXT, TEXT), evaluations=3, blocks=2)  # the lock is free again
    assert len(Archive.load(directory / "archive.json")) == 3


def test_a_search_and_a_training_of_the_same_adapter_exclude_each_other(directory: Path, tiny_llama: Path) -> None:
    said: list[str] = []
    data = text_data(tiny_llama, TEXT, TEXT)

    def refused(work: Callable[[], object]) -> None:
        with pytest.raises(ConfigError, match="adapter is in use by another training or search; wait until") as e:
            work()
        said.append(str(e.value))

    def train_over(*_: object) -> None:
        refused(lambda: train(tiny_llama, data, directory, tiny_options(steps=1), overwrite=True))
        refused(lambda: Adapter.from_pretrained(directory).save_pretrained(directory))

    def search_beside(done: int, total: int, stage: str, *_: object) -> None:
        if stage == "training":
            refused(lambda: search(directory, data, evaluations=3, blocks=2))

    search(directory, data, evaluations=2, blocks=2, progress=train_over)
    assert len(said) >= 4
    (directory / "notes").write_text("mine")
    said.clear()
    train(tiny_llama, data, directory, tiny_options(steps=2), overwrite=True, progress=search_beside)
    assert len(said) == 2
    assert adapter_archive(directory) is None
    assert (directory / "notes").is_file()
    search(directory, data, evaluations=2, blocks=2)
    assert not list(directory.glob(".*"))


_SEARCH = """
import sys
from coatrt.searching.run import search
from coatrt.errors import ConfigError
from support.tiny import text_data
try:
    search(sys.argv[1], text_data(sys.argv[2]), evaluations=5, blocks=2)
except ConfigError as error:
    print(str(error).rpartition("/")[2])
"""


def test_the_command_searches_and_the_plan_reads_it(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[0])
    arguments = [
        "search",
        str(directory),
        "--data",
        str(tmp_path / "text.txt"),
        "--evaluations",
        "10",
        "--blocks",
        "2",
        "--max-length",
        "32",
    ]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    said = json.loads(result.output)
    assert said["evaluations"] == 10
    losses = [row["loss"] for row in said["front"]]
    assert losses == sorted(losses, reverse=True)
    again = CliRunner().invoke(cli, arguments)
    assert "10 configurations measured" in again.output
    best = said["front"][-1]
    plan = CliRunner().invoke(cli, ["plan", str(directory), "--target", "rtx-5090", "--json"])
    shown = json.loads(plan.output)
    if shown["measured_loss"] is not None:
        assert shown["measured_loss"] <= best["loss"] + 1e-9
    else:  # the nearest to the allocation was itself the best
        assert shown["configuration_hash"] != best["configuration_hash"]
    (directory / "archive.json").write_text("{}")
    assert isinstance(CliRunner().invoke(cli, ["plan", str(directory), "--target", "t4"]).exception, ConfigError)


def test_another_adapter_or_other_text_is_refused(directory: Path, tiny_llama: Path) -> None:
    facts, other = {"evaluations": 2, "blocks": 2}, ["something else entirely. " * 40]
    search(directory, text_data(tiny_llama, TEXT, TEXT), **facts)
    with pytest.raises(ConfigError, match="other text"):
        search(directory, text_data(tiny_llama, other, other), **facts)
    with pytest.raises(ConfigError, match="blocks must be at least 1, got 0"):
        search(directory, text_data(tiny_llama, TEXT, TEXT), **{**facts, "blocks": 0})
    path = directory / "adapter.json"
    alter_sealed(path, lambda whole: whole.update(coatrt="0"))
    with pytest.raises(ConfigError, match="measured with another adapter"):
        adapter_archive(directory)
