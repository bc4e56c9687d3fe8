"""Bundles: a directory a service can load, with one manifest that names and hashes every file.

Nothing is parsed before its hash is checked: `Bundle.path` hashes a file the first time it is asked for. The manifest
has a seal of its own against accident, and may have a detached signature beside it, which is against an enemy.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any, Literal, NotRequired, TypedDict, get_args

from coatrt import __version__
from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import DecoderIO, LoraContract
from coatrt.errors import BundleError, ConfigError
from coatrt.models.matrices import ModelMatrices
from coatrt.system.files import sha256_file, write_text
from coatrt.system.json_data import convert, read_as, write_json
from coatrt.system.notices import warn_once
from coatrt.system.onnx_files import read_onnx
from coatrt.system.ranges import Bytes, Count, Measure, Whole
from coatrt.system.scratch import restore
from coatrt.system.signature import check_signature, sign

__all__ = ["BUNDLE_FORMAT", "MANIFEST", "SIGNATURE", "Bundle", "SignaturePolicy", "seal", "sign_manifest"]

BUNDLE_FORMAT = 3
MANIFEST = "manifest.json"
SIGNATURE = "model.sig"
SignaturePolicy = Literal["off", "warn", "require"]
"""What becomes of a bundle that a key has not signed: it is not looked at, said in one line, or refused."""

_AGAIN = "build the bundle again"


class _Model(TypedDict):
    source: str
    fingerprint: str
    family: str
    stop_tokens: list[Whole]


class _Configuration(TypedDict):
    file: str
    hash: str
    average_bits: Measure
    bytes: Bytes
    errors: dict[str, Measure]


class _Decoder(TypedDict):
    file: str
    weights: str
    io: DecoderIO


class _Engine(TypedDict):
    file: str
    sms: list[Whole]
    builder: str
    version: str
    seconds: Measure
    bytes: Bytes
    shapes: dict[str, Count]


class _File(TypedDict):
    sha256: str
    bytes: Bytes


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
        path.relative_to(directory).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path not in (directory / MANIFEST, directory / SIGNATURE)
    }
    manifest = {"format": BUNDLE_FORMAT, "coatrt": __version__, **facts, "files": files}
    write_json(directory / MANIFEST, manifest, sealed=True)


def sign_manifest(directory: Path, key: str | Path) -> None:
    """Write the signature of a manifest, which names the hash of every other file, beside it.

    Args:
        directory: of the bundle.
        key: PEM file of the private key, see `coatrt.system.signature`.

    Raises:
        ConfigError: the key does not serve.
    """
    write_text(directory / SIGNATURE, sign((directory / MANIFEST).read_bytes(), MANIFEST, key))


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Args:
        directory: where it is.
        manifest: the content of manifest.json, its structure checked.
        signed: whether the key given has signed it; None where none was asked for.
    """

    directory: Path
    manifest: Manifest
    signed: bool | None = None
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def open(
        cls, directory: str | Path, *, key: str | Path | bytes | None = None, policy: SignaturePolicy | None = None
    ) -> "Bundle":
        """Read and check the manifest; the files themselves are checked when they are used.

        Args:
            directory: where it is.
            key: PEM file (or its content) of the public key whose owner is trusted.
            policy: what becomes of a bundle without a signature by this key; by default "require" with a key, "off"
                without.

        Raises:
            BundleError: no bundle, altered, not signed, another bundle format, a file missing or of another size, or a
                path that leaves it.
            ConfigError: no such policy, a policy without a key, or the key does not serve.
        """
        directory = Path(directory)
        policy = policy or ("off" if key is None else "require")
        if policy not in get_args(SignaturePolicy):
            raise ConfigError(f"signature must be one of {', '.join(get_args(SignaturePolicy))}, got {policy!r}")
        if key is None and policy != "off":
            raise ConfigError(f"signature {policy} needs the public key it is checked with; give one (--key)")
        told: list[str] = []  # why it is not signed

        def check(manifest: bytes) -> None:
            if key is None or policy == "off":
                return
            path = directory / SIGNATURE
            found = check_signature(manifest, MANIFEST, path.read_bytes(), key) if path.is_file() else "there is none"
            told.append(found)
            by = "the key given" if isinstance(key, bytes) else key
            line = f"{directory} has no signature by {by} ({found}); fetch the bundle again from who signs it"
            if found and policy == "require":
                raise BundleError(line)
            if found:
                warn_once(line)

        restore(directory)
        if not (directory / MANIFEST).is_file():
            raise BundleError(f"{directory} is no bundle: it has no {MANIFEST}; make one with coatrt build")
        where = f"bundle manifest {directory / MANIFEST}"
        manifest = read_as(
            directory / MANIFEST, object, "bundle manifest", _AGAIN, BundleError, sealed=True, check=check
        )
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
        signed = not told[0] if told else None
        return cls(directory, convert(manifest, Manifest, where, _AGAIN, BundleError), signed)

    def sign(self, key: str | Path) -> None:
        """Sign the bundle with a private key (PEM file) after the hash of every file was checked.

        Raises:
            BundleError: a file was altered, or is one the manifest does not name.
            ConfigError: the key does not serve.
        """
        self.check_all()
        sign_manifest(self.directory, key)

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
        named = {*self.manifest["files"], MANIFEST, SIGNATURE}
        names = {path.relative_to(self.directory).as_posix(): path for path in paths}
        links = sorted(name for name, path in names.items() if path.is_symlink())
        if links:
            raise BundleError(f"{self.directory} holds links ({', '.join(links)}); copy the bundle with what they name")
        extra = sorted(name for name, path in names.items() if name not in named and not path.is_dir())
        if extra:
            raise BundleError(f"{self.directory} holds {', '.join(extra)}, which the manifest does not name; remove it")

    def decoder(self, form: str) -> tuple[Path, DecoderIO]:
        """Return the ONNX file of a graph form ("engine", "cpu", "cuda"), hashes checked with its weights, and its I/O.

        Raises:
            BundleError: the bundle has no such form.
        """
        decoders = self.manifest["decoders"]
        if form not in decoders:
            raise BundleError(f"{self.directory} has no {form} graph, only {', '.join(decoders)}; build it again")
        facts = decoders[form]
        graph = self.graph(facts["file"], facts["weights"])
        self.path(facts["weights"])
        return graph, facts["io"]

    def graph(self, name: str, weights: str = "") -> Path:
        """Return the path of an ONNX file after its hash was checked, and that it reads no file but `weights`.

        Args:
            name: of the file.
            weights: the file its external data may lie in, whose hash the caller checks; none by default.

        Raises:
            BundleError: see `path`; or it reads another file, whose content nothing guards.
        """
        path, mark = self.path(name), f"{name} reads {weights}"
        if mark not in self._checked:
            if path.suffix != ".onnx":  # ONNX Runtime takes another kind of file by its ending
                raise BundleError(f"{path} is no ONNX graph by its name; build the bundle again")
            for location in sorted(read_onnx(path).external):
                if normpath(PurePosixPath(name).parent / location) != weights:
                    raise BundleError(
                        f"{path} reads weights from {location!r}, the manifest gives it {weights or 'none'}; "
                        "do not use this bundle"
                    )
            self._checked.add(mark)
        return path

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
