"""The optimisation loop: parts of a batch, examples of a step, ranks, several processes."""

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
from coatrt.quantization.code_cache import CodeStore
from coatrt.system.distributed import Processes
from coatrt.training.loop import optimise
from coatrt.training.objective import Pass, accumulate_gradients
from coatrt.training.run import train
from support.formats import random_config
from support.tiny import TEXTS, text_data, tiny_options


def setting(adapter_directory: Path) -> tuple[FakeQuantModel, CoaLora, list[Any], torch.Tensor]:
    """A trained adapter whose θ matters, its model, three configurations and a batch."""
    adapter = Adapter.from_pretrained(adapter_directory)
    checkpoint = adapter.checkpoint()
    model = FakeQuantModel(checkpoint, CodeStore(checkpoint))
    lora = adapter.lora.train().requires_grad_(True)
    rng = np.random.default_rng(3)
    configs = [random_config(adapter.description.space, rng) for _ in range(3)]
    return model, lora, configs, torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(1))


def gradients(lora: CoaLora) -> dict[str, torch.Tensor]:
    result = {name: p.grad.clone() for name, p in lora.named_parameters() if p.grad is not None}
    lora.zero_grad()
    return result


@pytest.mark.parametrize("accumulate", [1, 3, 5])
def test_gradients_are_those_of_the_mean_loss(tiny_adapter: Path, accumulate: int) -> None:
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
    found = accumulate_gradients(model, lora, passes, accumulate)
    assert found.tolist() == pytest.approx([loss.item() for loss in losses], rel=1e-5)
    mine = gradients(lora)
    assert set(mine) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-6 + 1e-4 * float(value.abs().max()))


def test_configurations_of_a_step_have_examples_of_their_own(
    tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    options = tiny_options(batch=2, steps=2)
    optimise(model, lora, Examples.of_blocks(blocks), lambda _: configs, options, tmp_path, "run", Processes())
    assert [config for config, _ in seen] == [*configs, *configs]
    assert sorted(token for _, rows in seen for token in rows) == list(range(12))  # the whole epoch, each once


def test_ranks_and_no_hypernetwork_from_the_options(tiny_llama: Path, tmp_path: Path) -> None:
    options = tiny_options(steps=2, ranks=(("down_proj", 32),), preset="none", compensation=False)
    adapter = train(tiny_llama, text_data(tiny_llama), tmp_path / "a", options)
    assert {t.rank for t in adapter.description.contract.tensors if t.matrix.endswith("down_proj")} == {32}
    assert {t.rank for t in adapter.description.contract.tensors if not t.matrix.endswith("down_proj")} == {16}
    assert adapter.lora.theta is None
    low, high = (adapter.emit(adapter.description.space.uniform(text)) for text in ("nf3-g32", "int8"))
    assert all(torch.equal(low[name], high[name]) for name in low)
    assert all(low[tensor.B].any() for tensor in adapter.description.contract.tensors)
    with pytest.raises(ConfigError, match="unknown target module nothing"):
        train(tiny_llama, text_data(tiny_llama), tmp_path / "b", tiny_options(ranks=(("nothing", 16),)))


@pytest.mark.slow
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
        "--max-length",
        "32",
        "--batch",
        "4",
        "--calibration",
        "8",
        "--evaluation",
        "2",
        "--budgets",
        "5",
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
    adapted = [found["held_out"]["budgets"][0]["adapted"] for found in (one, two)]
    assert adapted[0] == pytest.approx(adapted[1], rel=1e-5)  # with float16 terms
    first, second = (Adapter.from_pretrained(tmp_path / name).lora.state_dict() for name in ("one", "two"))
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
