"""The optimisation loop's switches: parts of a batch, teachers, precision, processes, early stopping, ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from coatrt.adapter.adapter import Adapter
from coatrt.adapter.lora import CoaLora
from coatrt.data.examples import Examples
from coatrt.errors import ConfigError
from coatrt.evaluation.fake_quant import FakeQuantModel
from coatrt.models.checkpoint import Checkpoint, load_model
from coatrt.quantization.code_cache import CodeStore
from coatrt.system.distributed import Processes
from coatrt.training.loop import History, optimise
from coatrt.training.objective import Pass, accumulate_gradients
from coatrt.training.run import train
from support.formats import random_config
from support.tiny import TEXTS, tiny_options


def setting(adapter_directory: Path) -> tuple[FakeQuantModel, CoaLora, list[Any], torch.Tensor]:
    """A trained adapter whose θ matters, its model, three configurations and a batch."""
    adapter = Adapter.load(adapter_directory)
    checkpoint = adapter.checkpoint()
    model = FakeQuantModel(checkpoint, CodeStore(checkpoint))
    lora = adapter.lora.train().requires_grad_(True)
    rng = np.random.default_rng(3)
    configs = [random_config(adapter.space, rng) for _ in range(3)]
    return model, lora, configs, torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(1))


def same(configs: list[Any], tokens: torch.Tensor) -> list[Pass]:
    """Every configuration with the same rows."""
    return [Pass(config, Examples.of_blocks(tokens), tokens[:, 1:].numel()) for config in configs]


def gradients(lora: CoaLora) -> dict[str, torch.Tensor]:
    result = {name: p.grad.clone() for name, p in lora.named_parameters() if p.grad is not None}
    lora.zero_grad()
    return result


@pytest.mark.parametrize("change", [{}, {"accumulate": 3}, {"accumulate": 5}])
def test_gradients_are_those_of_the_mean_loss(tiny_adapter: Path, change: dict[str, int]) -> None:
    model, lora, configs, tokens = setting(tiny_adapter)
    targets = tokens.clone()
    targets[:, 0] = -100
    targets[0, :10] = -100
    targets[3, 1:-1] = -100
    targets[1, 15:] = -100  # a shorter row: a cut batch has its rows in another order
    # Each configuration has rows of its own, the last one fewer targets than the others.
    rows = [torch.arange(5), torch.tensor([4, 0, 1, 2, 4]), torch.tensor([3, 3, 3, 3, 0])]
    losses, passes = [], []
    for config, own in zip(configs, rows, strict=True):
        model.set_config(config)
        model.set_pairs(lora.pairs(config))
        logits, goals = model.logits(tokens[own])[:, :-1], targets[own, 1:]
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), goals.flatten(), ignore_index=-100))
        passes.append(Pass(config, Examples(tokens[own], targets[own]), int((goals != -100).sum())))
    torch.stack(losses).mean().backward()
    expected = gradients(lora)
    found = accumulate_gradients(model, lora, passes, tiny_options(batch=5, **change))
    assert found == pytest.approx([loss.item() for loss in losses], rel=1e-5)
    mine = gradients(lora)
    assert set(mine) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-6 + 1e-4 * float(value.abs().max()))


@pytest.mark.parametrize("teacher", ["base", "top"])
def test_a_teacher_adds_its_divergence(tiny_adapter: Path, tiny_llama: Path, teacher: str) -> None:
    model, lora, configs, tokens = setting(tiny_adapter)
    options = tiny_options(batch=5, distill=0.7, teacher=teacher)
    accumulate_gradients(model, lora, same(configs, tokens), options)
    found = gradients(lora)
    total, teacher_logits = torch.zeros(()), None
    if teacher == "base":
        with torch.no_grad():
            teacher_logits = load_model(Checkpoint.open(tiny_llama))(input_ids=tokens).logits[:, :-1]
    for config in configs:
        model.set_config(config)
        model.set_pairs(lora.pairs(config))
        logits = model.logits(tokens)[:, :-1]
        total = total + nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        if teacher_logits is not None:
            p = teacher_logits.softmax(-1)
            divergence = (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean()
            total = total + 0.7 * divergence
        elif teacher == "top":
            teacher_logits = logits.detach()
    (total / 3).backward()
    for name, value in gradients(lora).items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6 + 1e-4 * float(value.abs().max()))


@pytest.mark.parametrize("change", [{}, {"same_examples": True}, {"distill": 0.5}])
def test_configurations_of_a_step_have_examples_of_their_own(
    tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    model, lora, configs, _ = setting(tiny_adapter)
    blocks = torch.arange(12)[:, None].expand(12, 8).contiguous()  # block i holds token i alone
    set_config, predictions, seen = model.set_config, model.predictions, []

    def note_config(config: Any) -> None:
        seen.append((config, []))
        set_config(config)

    def note_rows(part: Examples) -> Any:
        seen[-1][1].extend(part.tokens[:, 0].tolist())
        return predictions(part)

    monkeypatch.setattr(model, "set_config", note_config)
    monkeypatch.setattr(model, "predictions", note_rows)
    options = tiny_options(batch=2, steps=2, **change)
    optimise(model, lora, Examples.of_blocks(blocks), lambda _: configs, options, tmp_path, "run", Processes())
    read = [(config, rows) for config, rows in seen if config is not None]  # None: the teacher
    assert [config for config, _ in read] == [*configs, *configs]
    if change:
        assert [rows for _, rows in read] == [read[0][1]] * 3 + [read[3][1]] * 3
        assert len({*read[0][1], *read[3][1]}) == 4
    else:
        assert sorted(token for _, rows in read for token in rows) == list(range(12))  # the whole epoch, each once


def test_ranks_and_no_hypernetwork_from_the_options(tiny_llama: Path, tmp_path: Path) -> None:
    options = tiny_options(steps=2, ranks=(("down_proj", 32),), preset="none", compensation=False, configs=1)
    adapter = train(tiny_llama, TEXTS, tmp_path / "a", options)
    assert {t.rank for t in adapter.contract.tensors if t.matrix.endswith("down_proj")} == {32}
    assert {t.rank for t in adapter.contract.tensors if not t.matrix.endswith("down_proj")} == {16}
    assert adapter.lora.theta is None
    low, high = (adapter.emit(adapter.space.uniform(text)) for text in ("nf3-g32", "int8"))
    assert all(torch.equal(low[name], high[name]) for name in low)
    assert all(low[tensor.B].any() for tensor in adapter.contract.tensors)
    with pytest.raises(ConfigError, match="rank of nothing is given"):
        train(tiny_llama, TEXTS, tmp_path / "b", tiny_options(ranks=(("nothing", 16),)))


def test_training_stops_when_the_hypervolume_no_longer_grows(tiny_llama: Path, tmp_path: Path) -> None:
    options = tiny_options(steps=40, learning_rate=0.5, warmup=0, evaluate_every=2, patience=2, budgets=(4.5, 6.0))
    adapter = train(tiny_llama, TEXTS, tmp_path / "a", options)
    measured = adapter.metrics["hypervolumes"]
    steps = [step for step, _ in measured]
    assert len(adapter.metrics["losses"]) == steps[-1] < 40
    best = max(measured, key=lambda row: row[1])
    assert steps[-1] - best[0] == 4
    found = adapter.metrics["held_out"]
    points = sorted((row["bits"], row["adapted"]) for row in found["budgets"])
    reference = (adapter.space.max_bits, found["full_precision"] + 1)
    area, ceiling = 0.0, reference[1]  # the two rectangles of the adapter that was kept
    for bits, loss in points:
        if loss < ceiling:
            area, ceiling = area + (reference[0] - bits) * (ceiling - loss), loss
    assert area == pytest.approx(best[1], rel=1e-6)


def test_patience_counts_measurements_since_the_best() -> None:
    history = History(measured=[(2, 1.0), (4, 3.0), (6, 2.0), (8, 2.5)])
    assert history.best == 4
    assert history.exhausted(2)
    assert not history.exhausted(3)
    assert not history.exhausted(0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"accumulate": 5},
        {"patience": 1},
        {"teacher": "nobody"},
        {"precision": "int8"},
        {"rate_ratio": 0.0},
        {"distill": -1},
    ],
)
def test_options_refuse_nonsense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"is given|cannot be cut|needs evaluate_every"):
        tiny_options(**wrong)


def test_two_processes_learn_what_one_does(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{i:02}.txt").write_text(text)
    arguments = [
        "train",
        str(tiny_llama),
        "--data",
        str(tmp_path / "text"),
        "--formats",
        "int4-g32,int8",
        "--steps",
        "4",
        "--preset",
        "coatrt",
        "--length",
        "32",
        "--batch",
        "4",
        "--calibration",
        "8",
        "--evaluation",
        "2",
        "--budgets",
        "5",
        "--evaluate-every",
        "2",
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "coatrt"]
    for name, program in (("one", [sys.executable, "-m", "coatrt"]), ("two", launch)):
        done = subprocess.run(
            [*program, *arguments, "-o", str(tmp_path / name)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # torchrun sets it: sums in one order in both
        )
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(two["hypervolumes"], one["hypervolumes"], rtol=1e-5)
    adapted = [found["held_out"]["budgets"][0]["adapted"] for found in (one, two)]
    assert adapted[0] == pytest.approx(adapted[1], rel=1e-5)  # with float16 terms
    first, second = (Adapter.load(tmp_path / name).lora.state_dict() for name in ("one", "two"))
    for name, value in first.items():
        more = 5e-3 * float(value.abs().max()) if name.startswith("C_") else 0.0  # solved from A, kept in float16
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-4 + more)


def test_processes_start_from_the_first_ones_values(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, torch\n"
        "from coatrt.system.distributed import Processes\n"
        "processes, rank = Processes(), int(os.environ['RANK'])\n"
        "mine = [torch.nn.Parameter(torch.full((n,), start + rank)) for n, start in ((3, 7.0), (4, 1.0))]\n"
        "processes.copy_from_first(mine)\n"
        "assert [p.unique().tolist() for p in mine] == [[7.0], [1.0]], mine\n"
        f"open(r'{tmp_path}' + f'/{{rank}}', 'w').close()\n"
        "processes.wait()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(
        launch, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"program.py", "0", "1"}
