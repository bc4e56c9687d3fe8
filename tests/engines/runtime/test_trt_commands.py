"""The commands on a bundle's engine: bench, run and verify, with TensorRT and the driver faked."""

import json
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from coatrt.bundle import Bundle
from coatrt.cli.main import cli, main
from coatrt.engines.bundles.verify import verify
from coatrt.errors import BundleError, ConfigError
from support.tiny import lora_elements
from support.trt_machine import (
    LAUNCH,
    Machine,
    install,
)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_bench_measures_the_engine(machine: Machine, bundle: Bundle, tmp_path: Path) -> None:
    place = tmp_path / "bench.json"
    shape = ("--prompt", 4, "--prompt", 6, "--tokens", 3, "--repeat", 2, "--batch", 2)
    done = command("bench", bundle.directory, "--backend", "trt", *shape, "-o", place)
    assert done.exit_code == 0, done.output
    found = json.loads(place.read_text())
    assert (found["backend"]["backend"], found["backend"]["activations"], found["backend"]["batch"]) == (
        "trt",
        "float16",
        2,
    )
    assert [(row["tokens"], row["lora"], row["samples"]) for row in found["prefill"]] == [
        (4, True, 2),
        (4, False, 2),
        (6, True, 2),
        (6, False, 2),
    ]
    assert [row["samples"] for row in found["decode"]] == [6, 6]
    assert found["lora_switch"]["samples"] == 2
    size, model = found["bytes_per_token"], bundle.model_matrices
    assert size["weights"] == bundle.config.nbytes(model) + model.other_bytes
    assert size["lora"] == 2 * lora_elements(model)  # float16
    assert size["kv_cache"] == 2 * (2 * 2 * 2 * 96 * 16) * 2  # float16 × keys and values of all slots × sequences
    assert found["bytes_per_s"] == pytest.approx(size["total"] / (found["decode"][0]["p50_ms"] / 1e3))
    assert "LoRA switch" in done.output
    assert "trt float16, batch 2\n" in done.output
    steps = 3 * 2 * 3  # rounds, with and without LoRA, tokens
    assert machine.driver.calls[LAUNCH] == steps - 1
    refused = command("bench", bundle.directory, "--backend", "trt", "--prompt", 96, "--tokens", 1).exception
    assert isinstance(refused, ConfigError)
    assert str(refused).startswith("prompts and tokens need 97 positions, the decoder has 96; use shorter prompts")


def test_run_says_what_the_cpu_form_says(machine: Machine, bundle: Bundle) -> None:
    said = [
        command("run", bundle.directory, "-p", "Once upon a time", "--max-tokens", 12, "--backend", backend, *more)
        for backend, more in (("trt", ()), ("ort", ("--accuracy-level", 0, "--context", 96)))
    ]
    assert [done.exit_code for done in said] == [0, 0]
    assert said[0].stdout == said[1].stdout
    assert machine.driver.calls[LAUNCH] >= 10


@pytest.mark.parametrize("arguments", [("run", "-p", "x"), ("bench",)])
def test_commands_refuse_another_gpu_in_one_line(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
) -> None:
    install(Machine(sm=120), monkeypatch)
    name, *more = arguments
    monkeypatch.setattr(sys, "argv", ["coatrt", name, str(bundle.directory), *more, "--backend", "trt"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr() == (
        "",
        "coatrt: the bundle has engines for SM89, this GPU is SM120; build a bundle for it\n",
    )


def test_verify_runs_the_engine_where_it_can(
    machine: Machine, bundle: Bundle, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = re.match(
        r"largest \|Δlogit\| to cpu\.onnx (\S+) of the largest logit", verify(bundle, numbers=False).engine
    )
    assert found is not None
    assert 0 < float(found[1]) <= 5e-3
    assert machine.driver.calls[LAUNCH] == 15  # of 16 steps behind two pieces of the prompt
    machine.tensorrt.factor = 1.5
    with pytest.raises(BundleError, match=r"logits of the engine differ from those of cpu\.onnx by (4\.9|5\.0)"):
        verify(bundle, numbers=False)
    install(Machine(sm=120), monkeypatch)
    report = verify(bundle, numbers=False)
    assert report.engine == "not run: the bundle has engines for SM89, this GPU is SM120; build a bundle for it"
    assert f"engine, here   {report.engine}\n" in report.text()
    assert verify(Bundle.open(tiny_bundle), numbers=False).engine == ""
