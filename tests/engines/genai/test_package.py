"""A package is read by ONNX Runtime's own code, and each variant by onnxruntime-genai."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coatrt.adapter.adapter import Adapter
from coatrt.bundle import Bundle
from coatrt.devices.profiles import device_profile
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.genai.destination import SUMS
from coatrt.engines.genai.options import GenaiOptions
from coatrt.engines.genai.package import package_genai
from coatrt.engines.runtime.generate import encode_prompt
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.errors import ConfigError
from coatrt.planning import planner
from support.bundles import make_bundle
from support.ort_package import resolve, selected_variant

NAMES = {"rtx-4090": 5.2, "l4": 4.2, "cpu": 6.0}


@pytest.fixture(scope="module")
def bundles(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    adapter, folder = Adapter.from_pretrained(tiny_adapter), tmp_path_factory.mktemp("fleet")
    made = {}
    for name, bits in NAMES.items():
        plan = planner.plan(adapter.description, device_profile(name), bits=bits, context=96, prefill=32)
        options = BundleOptions(context=96, engine=False)
        made[name] = make_bundle(adapter, plan.config, name, folder / name, options, plan=plan)
    return made


@pytest.fixture(scope="module")
def package(bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package_genai(list(bundles.values()), tmp_path_factory.mktemp("p") / "fleet.ortpackage").directory


def manifest_of(package: Path) -> dict[str, Any]:
    variants: dict[str, Any] = json.loads((package / "manifest.json").read_text())["components"]["model"]["variants"]
    return variants


def test_onnx_runtime_takes_the_variant_of_the_cpu_and_finds_the_shared_tokenizer(package: Path) -> None:
    name, folder = selected_variant(package)
    assert (name, folder) == ("cpu", package / "cpu")
    reference = json.loads((folder / "genai_config.json").read_text())["model"]["tokenizer_dir"]
    (asset,) = (package / "shared_assets").iterdir()
    assert resolve(package, folder, reference).samefile(asset)
    assert resolve(package, folder, asset.name.replace("-", ":", 1)).samefile(asset)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(asset.iterdir())]
    assert asset.name == f"sha256-{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def test_every_variant_loads_on_the_cpu_with_its_own_map_and_lora(
    og: Any, package: Path, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    options = GenaiOptions(provider="cpu")
    on_cpu = package_genai(list(bundles.values()), tmp_path / "cpu.ortpackage", options).directory
    assert selected_variant(on_cpu)[0] == "l4"  # the first: it needs the least memory
    for name, bundle in bundles.items():
        model = og.Model(str(on_cpu / name))
        tokenizer, ids = og.Tokenizer(model), encode_prompt(bundle.tokenizer(), "cat the cat")
        assert [int(token) for token in tokenizer.encode("cat the cat")] == ids
        generator = og.Generator(model, og.GeneratorParams(model))
        generator.append_tokens(ids)
        decoder = load_decoder(bundle, context=96)
        decoder.set_lora(load_lora(bundle.path("lora.safetensors"), bundle.contract))
        assert np.abs(generator.get_output("logits")[0, 0] - decoder.prefill([ids])[0]).max() < 1e-4
        assert (package / name / "adapters" / "lora.onnx_adapter").is_file()


def test_what_the_manifest_says(package: Path, bundles: dict[str, Bundle]) -> None:
    variants = manifest_of(package)
    assert list(variants) == ["l4", "rtx-4090", "cpu"]  # by the bytes of their weights
    providers = {name: entry["ep"] for name, entry in variants.items()}
    assert providers == dict.fromkeys(("l4", "rtx-4090"), "CUDAExecutionProvider") | {"cpu": "CPUExecutionProvider"}
    for name, entry in variants.items():
        assert entry["compatibility_string"] == f"coatrt;device={name};sm={0 if name == 'cpu' else 89}"
        assert entry["additional_metadata"]["device"]["id"] == name
        assert entry["additional_metadata"]["configuration"] == bundles[name].config.hash
    checked = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=package, check=False)
    assert checked.returncode == 0


def test_variants_of_one_configuration_share_a_directory(tiny_adapter: Path, tmp_path: Path) -> None:
    adapter = Adapter.from_pretrained(tiny_adapter)
    config = planner.plan(adapter.description, device_profile("l4"), bits=4.2, context=96, prefill=32).config
    options = BundleOptions(context=96, engine=False)
    both = [make_bundle(adapter, config, name, tmp_path / name, options) for name in ("l4", "rtx-4090")]
    package = package_genai(both, tmp_path / "fleet.ortpackage")
    assert package.variants == {"l4": "l4", "rtx-4090": "l4"}
    assert sorted(path.name for path in package.directory.iterdir() if path.is_dir()) == ["l4", "shared_assets"]
    on_cpu = package_genai(both, tmp_path / "cpu.ortpackage", GenaiOptions(provider="cpu"))
    assert selected_variant(on_cpu.directory) == ("l4", on_cpu.directory / "l4")


def test_what_is_refused(bundles: dict[str, Bundle], package: Path, tmp_path: Path) -> None:
    def refusal(*chosen: Bundle, output: Path = tmp_path / "out", **more: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            package_genai(chosen, output, **more)
        return str(caught.value)

    own = bundles["l4"]
    assert refusal() == "a package needs at least one bundle; give bundles that coatrt build wrote"
    assert "cannot have two entries called l4" in refusal(own, own)
    assert "lies inside the bundle" in refusal(own, output=own.directory / "x")
    assert "holds an export" in refusal(own, output=package)
    other = Bundle(own.directory, {**own.manifest, "model": {**own.manifest["model"], "fingerprint": "x"}})
    assert refusal(own, other) == "the bundles are of 2 models; give bundles of one"
    files = {**own.manifest["files"], "tokenizer/tokenizer.json": {"sha256": "0", "bytes": 1}}
    line = refusal(own, Bundle(own.directory, {**own.manifest, "files": files}))
    assert line == "the bundles have different tokenizers; build them from one model directory"
    assert not (tmp_path / "out").exists()


def test_a_device_s_name_never_leads_out_of_the_package(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    own = bundles["l4"]
    for name in ("../../evil", "/evil", "..", "", "a/b"):
        hostile = Bundle(own.directory, {**own.manifest, "device": {"id": name}})
        assert list(package_genai([hostile], tmp_path / "p", overwrite=True).variants) == ["l4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]


def test_a_package_may_be_replaced(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    for overwrite in (False, True):
        package_genai([bundles["cpu"]], tmp_path / "fleet", overwrite=overwrite)
    assert list(manifest_of(tmp_path / "fleet")) == ["cpu"]
