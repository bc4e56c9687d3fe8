"""A training that was interrupted: resumed exactly, and never with what another run left."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from coatrt.configs.config import QuantConfig
from coatrt.errors import ConfigError
from coatrt.training.config_sampler import TrainingSampler
from coatrt.training.options import TrainOptions
from coatrt.training.run import train
from support.tiny import TEXTS, text_data, tiny_options


class _Killed(Exception):
    pass


def test_a_resumed_run_equals_an_unbroken_one(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tiny_llama, text_data(tiny_llama), tmp_path / "whole", tiny_options())
    draw = TrainingSampler.draw

    def killed(self: TrainingSampler, step: int) -> list[QuantConfig]:
        if step == 5:
            raise _Killed
        return draw(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingSampler, "draw", killed)
        with pytest.raises(_Killed):
            train(tiny_llama, text_data(tiny_llama), tmp_path / "broken", tiny_options())
    with pytest.raises(ConfigError, match="--resume to continue it"):
        train(tiny_llama, text_data(tiny_llama), tmp_path / "broken", tiny_options())
    with pytest.raises(ConfigError, match="other options"):
        train(tiny_llama, text_data(tiny_llama), tmp_path / "broken", tiny_options(seed=5), resume=True)
    resumed = train(tiny_llama, text_data(tiny_llama), tmp_path / "broken", tiny_options(), resume=True)
    assert resumed.description.metrics["losses"] == whole.description.metrics["losses"]
    first, second = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (
        train(tiny_llama, text_data(tiny_llama), tmp_path / "broken", tiny_options(), resume=True).description.metrics
        == resumed.description.metrics
    )
    with pytest.raises(ConfigError, match="finished adapter"):
        train(tiny_llama, text_data(tiny_llama), tmp_path / "broken", tiny_options())


@pytest.mark.slow
def test_a_killed_process_resumes(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{i:02}.txt").write_text(text)
    arguments = [
        sys.executable,
        "-m",
        "coatrt",
        "train",
        str(tiny_llama),
        "--data",
        str(tmp_path / "text"),
        "-o",
        str(tmp_path / "out"),
        "--formats",
        "int4-g32,int8",
        "--steps",
        "100000",
        "--max-length",
        "32",
        "--batch",
        "2",
        "--evaluation",
        "2",
        "--budgets",
        "5",
        "--checkpoint-every",
        "1",
    ]
    state = tmp_path / "out" / "training" / "state.safetensors"
    deadline = time.monotonic() + 240

    def progress() -> dict[str, Any]:
        with safe_open(state, framework="pt") as opened:
            return json.loads(opened.metadata()["progress"])  # type: ignore[no-any-return]

    def wait_for(step: int, process: subprocess.Popen[bytes]) -> None:
        while not (state.is_file() and progress()["step"] >= step):
            assert process.poll() is None, "training ended"
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(3, process)
        finally:
            os.kill(process.pid, signal.SIGKILL)
    left = progress()
    assert left["step"] >= 3
    assert all(math.isfinite(loss) for losses in left["losses"] for loss in losses)
    wrong = subprocess.run(arguments, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "--resume" in wrong.stderr
    with subprocess.Popen([*arguments, "--resume"], stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(left["step"] + 3, process)
        finally:
            process.kill()
    assert progress()["losses"][: left["step"]] == left["losses"]


def test_resuming_takes_no_sensitivities_of_another_run(tiny_llama: Path, tmp_path: Path) -> None:
    """A kill between them and the first checkpoint leaves nothing but these."""
    options, output = tiny_options(steps=1, preset="none"), tmp_path / "a"

    def interrupted(options: TrainOptions) -> None:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("coatrt.training.run.optimise", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            train(tiny_llama, text_data(tiny_llama), output, options)

    interrupted(options)
    left = (output / "training" / "sensitivity.json").read_bytes()
    with pytest.raises(ConfigError, match="resume with the same ones"):
        train(tiny_llama, text_data(tiny_llama), output, replace(options, calibration=2), resume=True)
    assert (output / "training" / "sensitivity.json").read_bytes() == left
    (output / "training" / "run.json").unlink()  # as an older version left it: whose they are nobody knows
    adapter = train(tiny_llama, text_data(tiny_llama), output, replace(options, calibration=2), resume=True)
    fresh = train(tiny_llama, text_data(tiny_llama), tmp_path / "b", replace(options, calibration=2))
    assert adapter.description.sensitivity.costs == fresh.description.sensitivity.costs
    assert (output / "training").exists() is False
