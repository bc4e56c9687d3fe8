"""`coatrt devices calibrate`: the profile of the GPU here, what is refused, where timings go."""

import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner

from coatrt.cli.main import cli, main
from coatrt.engines.measure import cuda_timings
from coatrt.engines.runtime.options import Backend
from coatrt.planning.measured_latency import MeasuredLatency, TimedBackend, timings_path

H100 = "NVIDIA H100 80GB HBM3, 9.0, 81559"


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what puts a GPU of nvidia-smi's words on the path."""

    def place(line: str | None) -> None:
        program = tmp_path / "nvidia-smi"
        program.unlink(missing_ok=True)
        if line is not None:
            program.write_text(f'#!/bin/sh\necho "{line}"\n')
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return place


def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Run `main`, which exits with 2, and return its one line."""
    monkeypatch.setattr(sys, "argv", ["coatrt", "devices", "calibrate", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert captured.out == ""
    return line


@pytest.mark.parametrize(
    ("line", "arguments", "said"),
    [
        (None, ("--backend", "cuda"), "no NVIDIA GPU (nvidia-smi"),
        (None, ("--backend", "trt"), "no NVIDIA GPU (nvidia-smi"),
        (None, ("--backend", "trt", "--profile", "h100"), "no NVIDIA GPU (nvidia-smi"),
        ("NVIDIA Foo 7, 9.0, 1000", ("--backend", "cuda"),
         "no profile for this GPU, NVIDIA Foo 7; give --profile with one of SM90: h100-pcie, h100, h200"),
        (H100, ("--backend", "cuda", "--profile", "rtx-4090"), "--profile must be of SM90 like this GPU, NVIDIA H100"),
        (H100, ("--backend", "cuda", "--profile", "rtx-4091"), "did you mean rtx-4090"),
        (H100, ("--backend", "trt"), "building with tensorrt needs tensorrt: pip install '.[tensorrt]'"),
        (H100, ("--profile", "h100"), "--backend ort times the CPU, --profile h100 is a GPU"),
    ],
)  # fmt: skip
def test_what_cannot_be_timed_is_one_line(
    line: str | None,
    arguments: tuple[str, ...],
    said: str,
    tiny_adapter: Path,
    gpu: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu(line)
    assert said in refusal(capsys, monkeypatch, tiny_adapter, *arguments)


@pytest.mark.slow
def test_a_gpu_is_timed_for_its_profile(tiny_adapter: Path, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_timings, "_WORKING_SET", 1 << 16)
    monkeypatch.setattr(cuda_timings, "_BUDGET", 0.0)
    defaults = cuda_timings.time_cuda.__kwdefaults__
    assert defaults is not None
    for name, value in (("provider", "cpu"), ("tokens", (1, 4)), ("contexts", (16, 32))):
        monkeypatch.setitem(defaults, name, value)
    arguments = ["devices", "calibrate", str(tiny_adapter), "--backend", "cuda"]
    for line, profile, more in ((H100, "h100", []), ("NVIDIA Foo 7, 9.0, 1000", "h200", ["--profile", "h200"])):
        gpu(line)
        result = CliRunner().invoke(cli, [*arguments, *more], catch_exceptions=False)
        path = timings_path(profile, "cuda")
        try:
            assert f"{path}: timings of {profile} with onnxruntime" in result.output
            assert "all else, 1 tokens, 16 slots, no LoRA:" in result.output
            made = MeasuredLatency.load(path)
            assert (made.device, made.settings["gpu"]) == (profile, line.split(",")[0])
        finally:
            path.unlink()


def test_backends_are_those_of_the_runtime() -> None:
    assert set(get_args(TimedBackend)) == set(get_args(Backend))
