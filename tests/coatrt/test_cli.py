"""The commands as a user types them: help, JSON, and one clear line with exit code 2 for every wrong input."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from coatrt.adapter.description import AdapterDescription
from coatrt.bundle import Bundle
from coatrt.cli.common import warn_of_idle_gpu
from coatrt.cli.main import cli, main
from coatrt.errors import ConfigError
from coatrt.evaluation.presentation import perplexity_text
from coatrt.planning.plan import read_choice
from support.tiny import TEXTS

COMMANDS = ("devices", "train", "search", "plan", "export", "build", "adapt", "verify", "run", "bench", "report")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=True)


def good(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Run `main` and return its one line on standard error."""
    monkeypatch.setattr(sys, "argv", ["coatrt", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("coatrt: ")
    assert captured.out == ""
    return line


def test_help_of_everything_and_without_heavy_imports() -> None:
    assert all(name in good("--help") for name in COMMANDS)
    for name in COMMANDS:
        assert "Usage:" in good(name, "--help")
    assert run("nonsense").exit_code == 2
    heavy = "torch,numpy,onnx,onnxruntime,transformers,scipy,tensorrt_rtx,polygraphy,matplotlib"
    code = "import sys; from coatrt.cli.main import cli; cli(['--help'], standalone_mode=False)\n"
    code += f"assert not set('{heavy}'.split(',')) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_devices() -> None:
    listed = json.loads(good("devices", "--json"))
    assert {"rtx-4090", "cpu", "h100"} <= {row["id"] for row in listed}
    assert all(row["sources"] for row in listed)
    text = good("devices")
    assert "rtx-5090" in text
    assert "nvfp4" in text


def check_what_runs(bundle: Path, output: Path) -> None:
    """Generate and measure on the command line."""
    prompt = ("-p", "the cat", "--max-tokens", 8, "--context", 64)
    text = run("run", bundle, *prompt).stdout  # standard error says how fast that was
    assert text == run("run", bundle, *prompt).stdout
    assert good("run", bundle, *prompt, "--no-lora") != good("run", bundle, *prompt, "--temperature", 2, "--seed", 1)
    two = good("run", bundle, *prompt, "-p", "owl", "--chat")
    assert "[the cat]" in two
    assert "[owl]" in two
    measured = json.loads(good("bench", bundle, "--prompt", 4, "--tokens", 2, "--repeat", 1, "--json", "-o", output))
    assert measured["decode"][0]["samples"] == 2
    assert json.loads((output).read_text()) == measured


def test_the_chain_by_hand(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{i:02}.txt").write_text(text)
    adapter, bundle = tmp_path / "adapter", tmp_path / "bundle"
    said = good("train", tiny_llama, "--data", tmp_path / "text", "-o", adapter, "--formats", "nf3-g32,int4-g32,int8",
                "--steps", 3, "--batch", 2, "--max-length", 32, "--calibration", 2, "--evaluation", 2,
                "--budgets", "5,6", "--quantizer", "feedback")  # fmt: skip
    assert "trained        3 steps" in said
    assert json.loads((adapter / "adapter.json").read_text())["description"]["quantizer"] == "feedback"
    common = ("--context", 64, "--prefill", 16)
    asked = ("--target", "rtx-4090", "--bits", 5, *common)
    plan = json.loads(good("plan", adapter, *asked, "--json", "-o", tmp_path / "c.json"))
    assert plan["average_bits"] <= 5
    assert json.loads((tmp_path / "c.json").read_text()) == plan
    model = AdapterDescription.load(adapter).model
    config, again = read_choice(tmp_path / "c.json", model)
    assert again is not None
    assert again.to_json() == plan
    assert config == again.config
    fleet = json.loads(good("plan", adapter, "--target", "rtx-4090", "--target", "t4", "--bits", 6, "--json"))
    assert [row["device"] for row in fleet] == ["rtx-4090", "t4"]
    assert "int4-g32" not in fleet[1]["formats"]
    dry = good("build", adapter, "--target", "rtx-4090", "--bits", 5, "-o", bundle, "--dry-run", *common)
    assert plan["configuration_hash"] in dry
    assert not bundle.exists()
    good("build", adapter, "--target", "rtx-4090", "--bits", 5, "-o", bundle, "--no-engine", *common)
    assert Bundle.open(bundle).config.hash == plan["configuration_hash"]
    again = ("build", adapter, "--target", "rtx-4090", "--bits", 5, "-o", bundle, "--no-engine", *common)
    assert "up to date" in good(*again)
    assert "up to date" in good(*again, "--dry-run")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    pair = ("--target", "rtx-4090", "--target", "l4", "--config", tmp_path / "plan.json", "-o", tmp_path / "pair")
    assert good("build", adapter, *pair, "--no-engine", *common, "--dry-run").count("to build") == 2
    good("build", adapter, *pair, "--no-engine", *common)
    hashes = {Bundle.open(tmp_path / "pair" / name).config.hash for name in ("rtx-4090", "l4")}
    assert hashes == {plan["configuration_hash"]}
    table = good(
        "plan", adapter, "--target", "t4", "--target", "l4", "--target", "rtx-4090", "--keep", "down_proj=int8"
    )
    assert [line.split()[0] for line in table.splitlines()[1:4]] == ["t4", "l4", "rtx-4090"]
    said = good("report", adapter, bundle, tmp_path / "pair", "--target", "t4", "-o", tmp_path / "report.html")
    assert "4 configurations, 2 with measured quality" in said  # training measured that configuration
    assert plan["configuration_hash"] in (tmp_path / "report.html").read_text()
    good("export", adapter, "--config", tmp_path / "c.json", "-o", tmp_path / "exported", "--context", 64)
    assert Bundle.open(tmp_path / "exported").config.hash == plan["configuration_hash"]
    assert "largest |Δlogit|" in good("verify", bundle)
    said = good("verify", bundle, "--data", tmp_path / "text", "--max-length", 32, "--examples", 4)
    assert "held-out perplexity, 4 blocks of text" in said and str(bundle.with_name("bundle.quality.json")) in said
    quality = json.loads(bundle.with_name("bundle.quality.json").read_text())["quality"]
    assert perplexity_text(quality["adapted"]["loss"]) in said
    assert "1 configuration, 1 with measured quality" in good("report", bundle, "-o", tmp_path / "report.html")
    assert json.loads(good("verify", bundle, "--json", "--no-torch"))["torch_difference"] is None
    (tmp_path / "other.json").write_text('{"default": "int8"}')
    good("adapt", bundle, "--config", tmp_path / "other.json", "-o", tmp_path / "other.safetensors")
    check_what_runs(bundle, tmp_path / "b")


@pytest.fixture
def places(tiny_llama: Path, tiny_adapter: Path, tiny_cli_bundle: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    truncated = Path(shutil.copytree(tiny_llama, tmp_path / "truncated"))
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    flipped = Path(shutil.copytree(tiny_cli_bundle, tmp_path / "flipped"))
    data = bytearray((flipped / "weights.bin").read_bytes())
    data[1234] ^= 1
    (flipped / "weights.bin").write_bytes(data)
    planted = Path(shutil.copytree(tiny_cli_bundle, tmp_path / "planted"))
    (planted / "tokenizer" / "vocab.json").write_text("{}")
    (tmp_path / "unknown-matrix.json").write_text(
        '{"default": "int8", "matrices": {"model.layers.99.mlp.up_proj": "int8"}}'
    )
    (tmp_path / "unknown-format.json").write_text('{"default": "int5"}')
    (tmp_path / "no-pattern.json").write_text('{"default": "int8", "patterns": {"nothing.*": "int8"}}')
    (tmp_path / "illegal.json").write_text('{"default": "nvfp4"}')
    (tmp_path / "int8.json").write_text('{"default": "int8"}')
    (tmp_path / "webapp").mkdir()
    (tmp_path / "webapp" / "manifest.json").write_text('{"name": "an app"}')
    return {
        "model": tiny_llama,
        "adapter": tiny_adapter,
        "bundle": tiny_cli_bundle,
        "truncated": truncated,
        "flipped": flipped,
        "planted": planted,
        "here": tmp_path,
        "out": tmp_path / "out",
    }


@pytest.fixture(scope="session")
def tiny_cli_bundle(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "bundle"
    good("build", tiny_adapter, "--target", "rtx-4090", "--bits", 5, "-o", directory, "--no-engine", "--context", 64)
    return directory


WRONG = {
    "missing model": ("train {here}/none --data {here}/text.txt -o {out}", "none does not exist"),
    "missing data": ("train {model} --data {here}/none.txt -o {out}", "none.txt does not exist"),
    "truncated weights": ("train {truncated} --data {here}/text.txt -o {out}", "damaged or truncated"),
    "format to train": ("train {model} --data {here}/text.txt -o {out} --formats int5", "no weight format int5"),
    "rank": (
        "train {model} --data {here}/text.txt -o {out} --rank 10 --max-length 32",
        "the LoRA rank must be a multiple of 16, got 10",
    ),
    "parts of a batch": ("train {model} --data {here}/text.txt -o {out} --accumulate 5", "accumulate must be at most"),
    "device to train on": ("train {model} --data {here}/text.txt -o {out} --device gpu", "no device 'gpu'; available"),
    "device to search on": ("search {adapter} --data {here}/text.txt --device tpu:0", "no device 'tpu:0'"),
    "finished adapter": ("train {model} --data {here}/text.txt -o {adapter}", "holds a finished adapter"),
    "missing adapter": ("plan {here}/none --target rtx-4090", "adapter {here}/none does not exist"),
    "unknown device": ("plan {adapter} --target rtx-4091", "did you mean rtx-4090"),
    "too little memory": ("plan {adapter} --target rtx-4090 --memory 1MiB", "not enough memory on rtx-4090"),
    "pin": ("plan {adapter} --target t4 --keep nothing=int8", "matches none"),
    "expression": ("plan {adapter} --target t4 --keep (.*)*(.*)*(.*)*(.*)*x=int8", "patterns are globs, not regular"),
    "pinned format": ("plan {adapter} --target t4 --keep lm_head=fp8", "for t4 and this adapter"),
    "speed nobody knows": ("plan {adapter} --target cpu --min-tokens-per-second 5", "coatrt devices calibrate"),
    "speed": ("plan {adapter} --target t4 --min-tokens-per-second 1e9", "the most predicted is"),
    "report of nothing": ("report {model} -o {out}", "not an adapter, a bundle or a directory of bundles: {model}"),
    "report into a directory": ("report {adapter} --target t4 -o {here}", "is a directory"),
    "jobs": ("build {adapter} --target cpu -o {out} --jobs 0", "must be at least 1"),
    "two outputs": ("plan {adapter} --target t4 --target l4 -o {out}", "-o takes one --target, got 2; give one"),
    "device to build": ("build {adapter} --target nothing -o {out}", "no device 'nothing'"),
    "matrix the model lacks": ("export {adapter} --config {here}/unknown-matrix.json -o {out}", "the model lacks"),
    "unknown format": ("export {adapter} --config {here}/unknown-format.json -o {out}", "no weight format int5"),
    "pattern": ("export {adapter} --config {here}/no-pattern.json -o {out}", "matches none"),
    "no configuration": ("export {adapter} --config {here}/none.json -o {out}", "does not exist"),
    "configuration and its limits": (
        "build {adapter} --target t4 --config {here}/illegal.json --bits 5 -o {out}",
        "{here}/illegal.json already holds the configuration; leave out --bits, or --config",
    ),
    "plan and another context": (
        "build {adapter} --target rtx-4090 --config {bundle}/plan.json --context 65 -o {out}",
        "{bundle}/plan.json was planned with --context 64; leave out --context",
    ),
    "plan and another limit": (
        "build {adapter} --target rtx-4090 --config {bundle}/plan.json --memory 1GiB -o {out}",
        "{bundle}/plan.json was planned without --memory; leave out --memory",
    ),
    "context of a plan": (
        "plan {adapter} --target t4 --context 8193",
        "context must be at most 8192, the positions of the model, got 8193",
    ),
    "context of a bundle": (
        "export {adapter} --config {here}/int8.json -o {out} --context 8193",
        "must be at most 8192, the",
    ),
    "app in the place": ("export {adapter} --config {here}/int8.json -o {here}/webapp --overwrite", "other files ("),
    "illegal there": ("build {adapter} --target rtx-3060 --config {here}/illegal.json -o {out}", "cannot run nvfp4"),
    "model moved": ("export {adapter} --config {here}/illegal.json -o {out} --model {here}/none", "does not exist"),
    "model damaged": ("export {adapter} --config {here}/illegal.json -o {out} --model {truncated}", "damaged"),
    "output in use": ("export {adapter} --config {here}/illegal.json -o {here}", "holds other files"),
    "bundle with a flipped byte": ("verify {flipped}", "was altered"),
    "running it": ("run {flipped} -p x", "weights.bin was altered"),
    "no bundle": ("verify {here}", "not a bundle: "),
    "adapting to no format": ("adapt {bundle} --config {here}/unknown-format.json -o {out}", "no weight format"),
    "adapting to no matrix": ("adapt {bundle} --config {here}/unknown-matrix.json -o {out}", "the model lacks"),
    "adapting into the bundle": ("adapt {bundle} -o {bundle}/cpu.onnx", "lies inside the bundle"),
    "plan into a directory": ("plan {adapter} --target t4 -o {here}", "is a directory; give the name of a file"),
    "threads": ("run {bundle} -p x --threads 100000", "threads must be at most 512"),
    "no lora": ("run {bundle} -p x --lora {here}/none", "does not exist"),
    "no gpu": ("run {bundle} -p x --backend trt", "run the bundle with --backend ort"),
    "no gpu for onnxruntime": ("run {bundle} -p x --backend cuda", "run the bundle with --backend ort"),
    "no prompt": ("run {bundle}", "no prompt: give -p TEXT, -f FILE, or write it to standard input"),
    "empty file of a prompt": (
        "run {bundle} -f {here}/none.txt",
        "none.txt cannot be read (No such file or directory)",
    ),
    "empty prompt": ("run {bundle} -p x --max-tokens 0", "max_tokens must be at least 1"),
    "temperature": ("run {bundle} -p x --temperature -1", "temperature must be 0 or a positive number, got -1.0"),
    "seed": ("run {bundle} -p x --seed -1", "seed must be at least 0"),
    "planted beside the tokenizer": ("run {planted} -p x", "contains tokenizer/vocab.json, not in the manifest"),
    "bench": ("bench {bundle} --repeat 0", "must be at least 1"),
    "bench without a gpu": ("bench {bundle} --backend trt", "run the bundle with --backend ort"),
    "bench into a directory": ("bench {bundle} --repeat 0 -o {here}", "is a directory; give the name of a file"),
    "bench below a file": ("bench {bundle} --repeat 0 -o {here}/text.txt/b", "cannot be written"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(
    case: str, places: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(str(path) for path in places["here"].rglob("*"))
    command, said = WRONG[case]
    line = wrong(capsys, monkeypatch, *(part.format(**places) for part in command.split()))
    assert said.format(**places) in line
    assert sorted(str(path) for path in places["here"].rglob("*")) == before  # nothing half-written


def test_a_plan_is_built_again_as_it_was_asked(tiny_adapter: Path, tiny_cli_bundle: Path, tmp_path: Path) -> None:
    plan, choice = tiny_cli_bundle / "plan.json", ("build", tiny_adapter, "--target", "rtx-4090", "--no-engine")
    assert "up to date" in good(*choice, "--config", plan, "-o", tiny_cli_bundle)  # the same recipe
    good(*choice, "--config", plan, "-o", tmp_path / "again", "--context", 64, "--bits", 5)  # as the plan says
    again = Bundle.open(tmp_path / "again")
    assert again.path("plan.json").read_bytes() == plan.read_bytes()
    assert again.manifest["decoders"]["engine"]["io"].cache_length == 64
    said = good("adapt", tiny_cli_bundle, "--config", plan, "-o", tmp_path / "lora.safetensors")
    assert f"LoRA of {again.config.hash}" in said
    pair = ("--target", "l4", "--target", "rtx-4090", "--config", plan, "-o", tmp_path / "pair", "--no-engine")
    good("build", tiny_adapter, *pair)
    other, same = (Bundle.open(tmp_path / "pair" / name) for name in ("l4", "rtx-4090"))
    assert other.manifest["decoders"] == same.manifest["decoders"] == again.manifest["decoders"]
    assert ("plan.json" in other.manifest["files"], "plan.json" in same.manifest["files"]) == (False, True)


def test_wrong_options_are_clicks_own_errors(tiny_adapter: Path) -> None:
    for arguments in (
        ("plan", tiny_adapter),
        ("plan", tiny_adapter, "--target", "t4", "--memory", "6 elephants"),
        ("plan", tiny_adapter, "--target", "t4", "--keep", "lm_head"),
        ("report",),
        ("run", "x", "--temperature", "hot"),
        ("train", "m", "--data", "d", "-o", "o", "--budgets", "four"),
        ("train", "m", "--data", "d", "-o", "o", "--quantizer", "best"),
        ("train", "m", "--data", "d", "-o", "o", "--steps", "0"),
        ("train", "m", "--data", "d", "-o", "o", "--distill", "0.5"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output


def test_not_enough_memory_is_one_line(
    tiny_adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("plan", tiny_adapter, "--target", "t4")
    for raised, said in (
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough GPU memory: try coatrt train --precision bfloat16"),
        (MemoryError("1.2 TiB"), "not enough memory (1.2 TiB)"),
    ):
        monkeypatch.setattr("coatrt.planning.planner.plan", lambda *_, raised=raised, **__: throw(raised))
        assert said in wrong(capsys, monkeypatch, *arguments)


def test_too_few_tokens_to_calibrate_on_are_named(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coatrt.training.run.train", lambda *_, **__: throw(ConfigError("trained")))
    (tmp_path / "text.txt").write_text("word " * 200)  # 1,000 tokens, one each byte, of which a tenth is held out
    arguments = "train", tiny_llama, "-o", tmp_path / "adapter", "--max-length", 16, "--data", tmp_path / "text.txt"
    assert "calibrated on" not in run(*arguments).output
    output = run(*arguments, "--calibration", 4).output
    assert "coatrt: refined is calibrated on 64 tokens; this model needs 640: give more --data" in output


def throw(error: BaseException) -> None:
    raise error


def test_an_idle_gpu_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for there, device, said in ((True, "cpu", True), (True, "cuda", False), (False, "cpu", False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        warn_of_idle_gpu(device)
        assert ("--device cuda uses it" in capsys.readouterr().err) == said


def test_the_options_of_training_need_no_docstring() -> None:
    command = [sys.executable, "-OO", "-m", "coatrt", "train", "--help"]
    assert "--rate-ratio" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
