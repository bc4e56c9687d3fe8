"""`coatrt export` for onnxruntime-genai, and `coatrt build --genai`."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from coatrt.adapter.description import AdapterDescription
from coatrt.cli.main import cli
from coatrt.configs.config import QuantConfig
from coatrt.errors import CoatError

SIZES = ("--context", "96", "--prefill", "32", "--no-engine")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def wrong(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert isinstance(result.exception, CoatError), (result.output, result.exception)
    return str(result.exception)


@pytest.fixture(scope="module")
def fleet(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles for two devices, and their package."""
    folder = tmp_path_factory.mktemp("fleet")
    targets = ("--target", "l4", "--target", "cpu", "--bits", "5")
    package = ("-o", folder / "bundles", "--genai", folder / "fleet.ortpackage")
    said = run("build", tiny_adapter, *targets, *SIZES, *package)
    assert said.splitlines()[-1] == f"{folder / 'fleet.ortpackage'}: for onnxruntime-genai"
    return folder


def test_build_writes_a_package_of_several_targets_and_a_model_of_one(tiny_adapter: Path, fleet: Path) -> None:
    manifest = json.loads((fleet / "fleet.ortpackage" / "manifest.json").read_text())
    assert set(manifest["components"]["model"]["variants"]) == {"l4", "cpu"}
    one = ("--target", "cpu", "--bits", "5", "-o", fleet / "bundles" / "cpu", "--genai", fleet / "model")
    said = run("build", tiny_adapter, *SIZES, *one)  # the bundle is up to date
    assert "up to date" in said
    assert json.loads((fleet / "model" / "genai_config.json").read_text())["model"]["type"] == "decoder"
    assert "holds an export" in wrong("build", tiny_adapter, *SIZES, *one)
    run("build", tiny_adapter, *SIZES, *one, "--dry-run")
    inside = (*one[:-1], fleet / "bundles" / "cpu" / "genai")
    assert "lies inside the bundle" in wrong("build", tiny_adapter, *SIZES, *inside)


def test_export_of_a_bundle_and_of_several(tiny_adapter: Path, fleet: Path) -> None:
    bundles, out = fleet / "bundles", fleet / "exports"
    model = AdapterDescription.load(tiny_adapter).model
    QuantConfig.uniform(model, "int8").save(fleet / "all-int8.json")
    said = run("export", bundles / "cpu", "--format", "genai", "-o", out / "one", "--config", fleet / "all-int8.json")
    assert said.startswith(f"{out / 'one'}: for the cpu provider, adapters all-int8, lora, none, ")
    every = ("--all-logits", "--lora", "off", "--provider", "cpu", "--accuracy-level", "0", "--max-length", "50")
    said = run("export", bundles / "l4", "--format", "genai", "-o", out / "every", *every)
    assert said.startswith(f"{out / 'every'}: for the cpu provider, adapters lora, ")
    settings = json.loads((out / "every" / "genai_config.json").read_text())
    assert settings["search"]["max_length"] == 50
    assert settings["model"]["decoder"]["session_options"]["session.qdq_matmulnbits_accuracy_level"] == "0"
    said = run("export", bundles / "cpu", bundles / "l4", "--format", "ortpackage", "-o", out / "package")
    assert "cpu, l4" in said or "l4, cpu" in said


def test_one_line_for_options_that_do_not_go_together(tiny_adapter: Path, fleet: Path) -> None:
    bundle, new = fleet / "bundles" / "cpu", ("-o", fleet / "new")
    genai = ("--format", "genai", *new)
    assert wrong("export", bundle, *genai, "--context", 9) == "--context is not for --format genai; leave it out"
    line = wrong("export", tiny_adapter, "--all-logits", *new)
    assert line == "--all-logits is not for --format bundle; leave it out"
    line = wrong("export", bundle, bundle, *genai)
    assert line == "--format genai takes one SOURCE, got 2; give one, or --format ortpackage"
    assert "needs one configuration, got 0; give --config once" in wrong("export", tiny_adapter, *new)
    assert "not a bundle" in wrong("export", tiny_adapter, *genai)
    config = bundle / "configuration.json"
    assert "each variant has the LoRA of its bundle" in wrong(
        "export", bundle, "--format", "ortpackage", *new, "--config", config
    )
    assert "two files of --config have the same name" in wrong(
        "export", bundle, *genai, "--config", config, "--config", config
    )
    assert not (fleet / "new").exists()
