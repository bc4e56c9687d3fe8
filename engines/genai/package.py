"""Several bundles → one ONNX Runtime model package, with a variant for each device.

The layout is ONNX Runtime's (model_package/README.md of its sources, schema 1.0): manifest.json with one component,
whose variants each name an execution provider and a directory. A runtime chooses by execution provider; between
variants of one provider it takes the first, because ONNX Runtime's own providers read no compatibility string. So the
variants that need the least memory come first, and `pick_variant` or an application chooses by device. No variant names
a kind of device: ONNX Runtime 1.31 then finds none for the CPU, and the provider implies it.

The releases of onnxruntime-genai so far load a variant's directory, not a package. Both find the tokenizer by a
relative path, which ONNX Runtime allows in the layout "installed".
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coatrt.bundle import MANIFEST, Bundle
from coatrt.engines.genai.destination import SUMS, check_destination, write_sums
from coatrt.engines.genai.export import Variant, variant_of
from coatrt.engines.genai.options import GenaiOptions
from coatrt.errors import ConfigError
from coatrt.system.files import atomic_directory, sha256_file
from coatrt.system.json_data import write_json

__all__ = ["COMPONENT", "PROVIDERS", "GenaiPackage", "package_genai"]

COMPONENT = "model"
_ASSETS = "shared_assets"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class GenaiPackage:
    """A package.

    Args:
        directory: where it is.
        variants: name of each variant → its directory in the package; variants of one configuration share one.
        nbytes: bytes of all files.
    """

    directory: Path
    variants: Mapping[str, str]
    nbytes: int


def package_genai(
    bundles: Sequence[Bundle],
    output: str | Path,
    options: GenaiOptions = GenaiOptions(),
    *,
    overwrite: bool = False,
) -> GenaiPackage:
    """Write bundles of one model as one model package, a variant for each; neither torch nor the base model is needed.

    A variant is called like its bundle's device, or like its bundle's directory where several bundles have one device.
    The tokenizer is in the package once, and so are the weights of bundles with the same configuration.

    Args:
        bundles: opened bundles of one model.
        output: the package's directory, by convention NAME.ortpackage; it appears when it is complete.
        options: see `GenaiOptions`; without a provider, each variant has that of its device.
        overwrite: replace an earlier export.

    Raises:
        ConfigError: no bundle, bundles of different models or tokenizers, names that repeat, or the output is in use or
            lies in a bundle.
        BundleError: a file of a bundle was altered.
    """
    output, variants = Path(output), _named(bundles, options)
    for bundle in bundles:
        if output.resolve().is_relative_to(bundle.directory.resolve()):
            raise ConfigError(f"{output} lies inside the bundle {bundle.directory}; give a path outside")
    check_destination(output, overwrite=overwrite)
    folders = _folders(variants)
    with atomic_directory(output) as temporary:
        digest = _share(bundles[0].folder("tokenizer"), temporary / _ASSETS)
        for name, variant in variants.items():
            if folders[name] == name:
                (temporary / name).mkdir()
                variant.write(temporary / name, {}, f"../{_ASSETS}/sha256-{digest}")
        entries = {name: _entry(variant, name, folders[name]) for name, variant in variants.items()}
        manifest = {
            "schema_version": "1.0",
            "layout": "installed",
            "description": f"{bundles[0].manifest['model']['source']}, by coatrt",
            "components": {COMPONENT: {"variants": entries}},
        }
        write_json(temporary / MANIFEST, manifest)
        nbytes = write_sums(temporary)
    return GenaiPackage(output, folders, nbytes)


def _named(bundles: Sequence[Bundle], options: GenaiOptions) -> dict[str, Variant]:
    """Return name → variant, those that need the least memory first.

    Raises:
        ConfigError: no bundle, bundles of different models or tokenizers, or names that repeat.
    """
    if not bundles:
        raise ConfigError("a package needs at least one bundle; give bundles that coatrt build wrote")
    models = {bundle.manifest["model"]["fingerprint"] for bundle in bundles}
    if len(models) > 1:
        raise ConfigError(f"the bundles are of {len(models)} models; give bundles of one")
    tokenizers = [_hashes(bundle, "tokenizer/") for bundle in bundles]
    if any(hashes != tokenizers[0] for hashes in tokenizers):
        raise ConfigError("the bundles have different tokenizers; build them from one model directory")
    devices = [str((bundle.manifest.get("device") or {}).get("id", "")) for bundle in bundles]
    unique = all(map(_plain, devices)) and len(set(devices)) == len(devices)
    names = devices if unique else [bundle.directory.resolve().name for bundle in bundles]
    taken = sorted({name for name in names if names.count(name) > 1 or name in (_ASSETS, MANIFEST, SUMS)})
    if taken:
        raise ConfigError(
            f"a package cannot have two entries called {taken[0]}; give bundles in directories of different names"
        )
    order = sorted(zip(names, bundles, strict=True), key=lambda pair: pair[1].manifest["configuration"]["bytes"])
    return {name: variant_of(bundle, options) for name, bundle in order}


def _plain(name: str) -> bool:
    """Return whether a name is that of a file in a directory, and of no other directory."""
    return name not in ("", "..") and Path(name).name == name and name.isprintable()


def _folders(variants: Mapping[str, Variant]) -> dict[str, str]:
    """Return name → directory; variants with equal content share that of the first."""
    first: dict[tuple[Any, ...], str] = {}
    folders = {}
    for name, variant in variants.items():
        manifest, files = variant.bundle.manifest, _hashes(variant.bundle)
        decoder = manifest["decoders"][variant.provider]
        content = (files[decoder["file"]], files[decoder["weights"]], files.get(manifest.get("lora", "")))
        folders[name] = first.setdefault((variant.provider, *content), name)
    return folders


def _hashes(bundle: Bundle, beginning: str = "") -> dict[str, str]:
    """Return file → SHA-256, of the bundle's files whose names begin so."""
    files = bundle.manifest["files"]
    return {name: facts["sha256"] for name, facts in files.items() if name.startswith(beginning)}


def _share(source: Path, assets: Path) -> str:
    """Copy a directory to the shared assets, and return its digest by ONNX Runtime's rule: names and contents."""
    paths = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.as_posix())
    lines = [f"{sha256_file(path)}  {path.relative_to(source).as_posix()}\n" for path in paths]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    shutil.copytree(source, assets / f"sha256-{digest}")
    return digest


def _entry(variant: Variant, name: str, folder: str) -> dict[str, Any]:
    """Return a variant's entry in the manifest."""
    manifest = variant.bundle.manifest
    device, configuration = manifest.get("device") or {}, manifest["configuration"]
    return {
        "variant_directory": folder,
        "ep": PROVIDERS[variant.provider],
        "compatibility_string": f"coatrt;device={device.get('id', name)};sm={device.get('sm', 0)}",
        "additional_metadata": {
            "device": device,
            "configuration": configuration["hash"],
            "average_bits": configuration["average_bits"],
        },
    }
