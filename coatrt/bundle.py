"""Bundles: a directory a service can load, with one manifest that names and hashes every file.

Nothing is parsed before its hash is checked: `Bundle.path` hashes a file the first time it is asked for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NotRequired, TypedDict

from coatrt import __version__
from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import DecoderIO, LoraContract
from coatrt.errors import BundleError
from coatrt.models.matrices import ModelMatrices
from coatrt.system.files import sha256_file
from coatrt.system.json_data import convert, read_as, write_json
from coatrt.system.scratch import restore

__all__ = ["BUNDLE_FORMAT", "MANIFEST", "Bundle", "seal"]

BUNDLE_FORMAT = 1
MANIFEST = "manifest.json"
_AGAIN = "build the bundle again"


class _Model(TypedDict):
    source: str
    fingerprint: str
    family: str
    stop_tokens: list[int]


class _Configuration(TypedDict):
    file: str
    hash: str
    average_bits: float
    bytes: int
    errors: dict[str, float]


class _Decoder(TypedDict):
    file: str
    weights: str
    io: DecoderIO


class _Engine(TypedDict):
    file: str
    sms: list[int]
    builder: str
    version: str
    seconds: float
    bytes: int
    shapes: dict[str, int]


class _File(TypedDict):
    sha256: str
    bytes: int


class Manifest(TypedDict):
    """What manifest.json holds (docs/bundle.md); keys of a later coatrt are passed over."""

    format: int
    coatrt: str
    model: _Model
    configuration: _Configuration
    matrices: ModelMatrices
    decoders: dict[str, _Decoder]
    engines: list[_Engine]
    versions: dict[str, str]
    files: dict[str, _File]
    quantizer: NotRequired[str]
    lora: NotRequired[str]
    device: NotRequired[dict[str, Any]]
    fingerprint: NotRequired[str]


def seal(directory: Path, facts: Mapping[str, Any]) -> None:
    """Hash every file under `directory` and write the manifest: `facts` plus format, version and files.

    Args:
        directory: a finished bundle but for its manifest.
        facts: the manifest's other keys, see `Bundle`.
    """
    files = {
        str(PurePosixPath(path.relative_to(directory))): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(directory / MANIFEST, {"format": BUNDLE_FORMAT, "coatrt": __version__, **facts, "files": files})


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Args:
        directory: where it is.
        manifest: the content of manifest.json, its structure checked.
    """

    directory: Path
    manifest: Manifest
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def open(cls, directory: str | Path) -> "Bundle":
        """Read and check the manifest; the files themselves are checked when they are used.

        Raises:
            BundleError: no bundle, another bundle format, a file missing or of another size, or a path that leaves it.
        """
        directory = Path(directory)
        restore(directory)
        if not (directory / MANIFEST).is_file():
            raise BundleError(f"{directory} is no bundle: it has no {MANIFEST}; make one with coatrt build")
        where = f"bundle manifest {directory / MANIFEST}"
        manifest = read_as(directory / MANIFEST, object, "bundle manifest", _AGAIN, BundleError)
        if not isinstance(manifest, dict) or manifest.get("format") != BUNDLE_FORMAT:
            given = manifest.get("format") if isinstance(manifest, dict) else None
            raise BundleError(
                f"{directory} has bundle format {given}; this coatrt {__version__} reads {BUNDLE_FORMAT}; rebuild it"
            )
        missing = sorted(Manifest.__required_keys__ - set(manifest))
        if missing or not isinstance(manifest["files"], dict):
            raise BundleError(f"{directory / MANIFEST} lacks {', '.join(missing) or 'files'}; build the bundle again")
        for name, facts in manifest["files"].items():
            parts = PurePosixPath(name)
            if parts.is_absolute() or ".." in parts.parts or "\\" in name:
                raise BundleError(f"{directory / MANIFEST} names {name!r}, which leaves the bundle; do not use it")
            path = directory / name
            if not path.is_file():
                raise BundleError(f"{directory} lacks {name}; copy the bundle again or build it again")
            if not path.resolve().is_relative_to(directory.resolve()):
                raise BundleError(
                    f"{directory / MANIFEST} names {name!r}, a link that leaves the bundle; do not use it"
                )
            if not isinstance(facts, dict) or not {"sha256", "bytes"} <= set(facts):
                raise BundleError(f"{directory / MANIFEST} gives no sha256 and bytes for {name}; build it again")
            if path.stat().st_size != facts["bytes"]:
                raise BundleError(
                    f"{name} has {path.stat().st_size} bytes, the manifest says {facts['bytes']}; copy the bundle again"
                )
        return cls(directory, convert(manifest, Manifest, where, _AGAIN, BundleError))

    def path(self, name: str) -> Path:
        """Return the path of a file of the bundle after its hash was checked (once per opened bundle).

        Raises:
            BundleError: the manifest does not name it, or its content is not what was built.
        """
        files = self.manifest["files"]
        if name not in files:
            raise BundleError(f"{self.directory} has no file {name}; it has {', '.join(sorted(files))}")
        path = self.directory / name
        if name not in self._checked:
            found = sha256_file(path)
            if found != files[name]["sha256"]:
                raise BundleError(
                    f"{path} was altered: sha256 {found[:12]}…, the manifest says {files[name]['sha256'][:12]}…; "
                    "copy the bundle again or build it again"
                )
            self._checked.add(name)
        return path

    def folder(self, name: str) -> Path:
        """Return the path of a folder of the bundle, for what opens whatever lies in it, after all of it was checked.

        Raises:
            BundleError: the manifest names no file in it, a file there was altered, is a link or is not named.
        """
        names = [file for file in self.manifest["files"] if file.startswith(f"{name}/")]
        if not names:
            raise BundleError(f"{self.directory} has no {name}/; copy the bundle again or build it again")
        self._refuse_strays([self.directory / name, *(self.directory / name).rglob("*")])
        for file in names:
            self.path(file)
        return self.directory / name

    def check_all(self) -> int:
        """Check the hash of every file and return how many there are.

        Raises:
            BundleError: a file was altered, is a link, or is there and the manifest does not name it.
        """
        self._refuse_strays(self.directory.rglob("*"))
        for name in self.manifest["files"]:
            self.path(name)
        return len(self.manifest["files"])

    def _refuse_strays(self, paths: Iterable[Path]) -> None:
        """Refuse links, which may lead to files that no hash guards, and what the manifest does not name."""
        named = {*self.manifest["files"], MANIFEST}
        names = {path.relative_to(self.directory).as_posix(): path for path in paths}
        links = sorted(name for name, path in names.items() if path.is_symlink())
        if links:
            raise BundleError(f"{self.directory} holds links ({', '.join(links)}); copy the bundle with what they name")
        extra = sorted(name for name, path in names.items() if name not in named and not path.is_dir())
        if extra:
            raise BundleError(f"{self.directory} holds {', '.join(extra)}, which the manifest does not name; remove it")

    def decoder(self, form: str) -> tuple[Path, DecoderIO]:
        """Return the ONNX file of a graph form ("engine" or "cpu"), hashes checked with its weights, and its I/O.

        Raises:
            BundleError: the bundle has no such form.
        """
        decoders = self.manifest["decoders"]
        if form not in decoders:
            raise BundleError(f"{self.directory} has no {form} graph, only {', '.join(decoders)}; build it again")
        facts = decoders[form]
        self.path(facts["weights"])
        return self.path(facts["file"]), facts["io"]

    @property
    def model_matrices(self) -> ModelMatrices:
        """The matrices of the model."""
        return self.manifest["matrices"]

    @property
    def config(self) -> QuantConfig:
        """The configuration the graphs were exported with."""
        return QuantConfig.load(self.path(self.manifest["configuration"]["file"]), self.model_matrices)

    @property
    def contract(self) -> LoraContract:
        """The LoRA contract."""
        return read_as(self.path("lora_io.json"), LoraContract, "LoRA contract", _AGAIN)
