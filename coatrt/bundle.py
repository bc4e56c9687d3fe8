"""Bundles: a directory a service can load, with one manifest that names and hashes every file.

Nothing is parsed before its hash is checked: `Bundle.path` hashes a file on first use. The manifest carries a hash of
itself, its seal, which detects accidents. A detached signature beside it detects tampering.
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
from coatrt.models.bundle_tokenizer import open_tokenizer
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
"""What to do with a bundle that the key has not signed: ignore it, warn, or refuse the bundle."""

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
    """The content of manifest.json (docs/reference/bundle.md); unknown keys of a later coatrt are ignored."""

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
        directory: a bundle, complete except for its manifest.
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
    """Sign the manifest, which names the hash of every other file, and write the signature beside it.

    Args:
        directory: the bundle's.
        key: PEM file of the private key, see `coatrt.system.signature`.

    Raises:
        ConfigError: the key cannot be used.
    """
    write_text(directory / SIGNATURE, sign((directory / MANIFEST).read_bytes(), MANIFEST, key))


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Args:
        directory: where it is.
        manifest: the content of manifest.json, its structure checked.
        signed: whether the key has signed it; None where no signature was checked.
    """

    directory: Path
    manifest: Manifest
    signed: bool | None = None
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def open(
        cls, directory: str | Path, *, key: str | Path | bytes | None = None, policy: SignaturePolicy | None = None
    ) -> "Bundle":
        """Read and check the manifest; other files are checked on first use.

        Args:
            directory: where it is.
            key: PEM file (or its content) of the public key whose owner is trusted.
            policy: what to do with a bundle that this key has not signed; by default "require" with a key, "off"
                without.

        Raises:
            BundleError: not a bundle, altered, not signed, another bundle format, a file missing or of another size,
                or a path that leaves it.
            ConfigError: unknown policy, a policy without a key, or the key cannot be used.
        """
        directory = Path(directory)
        policy = policy or ("off" if key is None else "require")
        if policy not in get_args(SignaturePolicy):
            raise ConfigError(f"signature must be one of {', '.join(get_args(SignaturePolicy))}, got {policy!r}")
        if key is None and policy != "off":
            raise ConfigError(f"the signature policy {policy} needs a public key; give one (--key)")
        failures: list[str] = []  # why the bundle is not signed, "" where it is; empty until checked

        def check(manifest: bytes) -> None:
            if key is None or policy == "off":
                return
            path = directory / SIGNATURE
            failure = (
                check_signature(manifest, MANIFEST, path.read_bytes(), key) if path.is_file() else f"no {SIGNATURE}"
            )
            failures.append(failure)
            by = "this key" if isinstance(key, bytes) else key
            line = f"{directory} has no signature by {by} ({failure}); download the bundle again from its publisher"
            if failure and policy == "require":
                raise BundleError(line)
            if failure:
                warn_once(line)

        restore(directory)
        if not (directory / MANIFEST).is_file():
            inside = sorted(path.parent.name for path in directory.glob(f"*/{MANIFEST}"))
            hint = f"give one of its bundles: {', '.join(inside)}" if inside else "create one with coatrt build"
            raise BundleError(f"not a bundle: {directory} (no {MANIFEST}); {hint}")
        where = f"bundle manifest {directory / MANIFEST}"
        manifest = read_as(
            directory / MANIFEST, object, "bundle manifest", _AGAIN, BundleError, sealed=True, check=check
        )
        if not isinstance(manifest, dict) or manifest.get("format") != BUNDLE_FORMAT:
            version = manifest.get("format") if isinstance(manifest, dict) else None
            raise BundleError(
                f"{directory} has bundle format {version}, coatrt {__version__} reads {BUNDLE_FORMAT}; build it again"
            )
        missing = sorted(Manifest.__required_keys__ - set(manifest))
        if missing or not isinstance(manifest["files"], dict):
            raise BundleError(f"{directory / MANIFEST} lacks {', '.join(missing) or 'files'}; build the bundle again")
        for name, entry in manifest["files"].items():
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
            if not isinstance(entry, dict) or not {"sha256", "bytes"} <= set(entry):
                raise BundleError(f"{directory / MANIFEST} has no sha256 and bytes for {name}; build the bundle again")
            if path.stat().st_size != entry["bytes"]:
                raise BundleError(
                    f"{name} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}; copy the bundle again"
                )
        signed = not failures[0] if failures else None
        return cls(directory, convert(manifest, Manifest, where, _AGAIN, BundleError), signed)

    def sign(self, key: str | Path) -> None:
        """Check the hash of every file and sign the bundle with a private key (PEM file).

        Raises:
            BundleError: a file was altered, or the manifest does not name it.
            ConfigError: the key cannot be used.
        """
        self.check_all()
        sign_manifest(self.directory, key)

    def path(self, name: str) -> Path:
        """Return the path of a file of the bundle, its hash checked (once per opened bundle).

        Raises:
            BundleError: the manifest does not name it, or its content is not what was built.
        """
        files = self.manifest["files"]
        if name not in files:
            raise BundleError(f"{self.directory} has no file {name}; it has {', '.join(sorted(files))}")
        path = self.directory / name
        if name not in self._checked:
            digest = sha256_file(path)
            if digest != files[name]["sha256"]:
                raise BundleError(
                    f"{path} was altered: sha256 {digest[:12]}…, the manifest says {files[name]['sha256'][:12]}…; "
                    "copy the bundle again or build it again"
                )
            self._checked.add(name)
        return path

    def folder(self, name: str) -> Path:
        """Return the path of a folder of the bundle, all files in it checked, for a library that opens any of them.

        Raises:
            BundleError: the manifest names no file in it, or a file there was altered, is a link or is not named.
        """
        names = [file for file in self.manifest["files"] if file.startswith(f"{name}/")]
        if not names:
            raise BundleError(f"{self.directory} has no {name}/; copy the bundle again or build it again")
        self._refuse_strays([self.directory / name, *(self.directory / name).rglob("*")])
        for file in names:
            self.path(file)
        return self.directory / name

    def tokenizer(self) -> Any:
        """Return the tokenizer of the model, its files checked; it needs neither torch nor transformers.

        Raises:
            BundleError: see `folder`.
            CheckpointError: a file cannot be read.
            ExtraError: it is of the few that need transformers, which is missing.
        """
        return open_tokenizer(self.folder("tokenizer"))

    def check_all(self) -> int:
        """Check the hash of every file and return how many there are.

        Raises:
            BundleError: a file was altered, is a link, or is not named in the manifest.
        """
        self._refuse_strays(self.directory.rglob("*"))
        for name in self.manifest["files"]:
            self.path(name)
        return len(self.manifest["files"])

    def _refuse_strays(self, paths: Iterable[Path]) -> None:
        """Refuse links, whose targets have no checked hash, and files that the manifest does not name."""
        known = {*self.manifest["files"], MANIFEST, SIGNATURE}
        names = {path.relative_to(self.directory).as_posix(): path for path in paths}
        links = sorted(name for name, path in names.items() if path.is_symlink())
        if links:
            raise BundleError(
                f"{self.directory} contains links ({', '.join(links)}); copy the bundle with the linked files"
            )
        extra = sorted(name for name, path in names.items() if name not in known and not path.is_dir())
        if extra:
            raise BundleError(f"{self.directory} contains {', '.join(extra)}, not in the manifest; remove it")

    def decoder(self, form: str) -> tuple[Path, DecoderIO]:
        """Return the ONNX file of a graph form ("engine", "cpu", "cuda") and its I/O.

        The hashes of the graph and of its weights are checked.

        Raises:
            BundleError: the bundle has no such form.
        """
        decoders = self.manifest["decoders"]
        if form not in decoders:
            raise BundleError(f"{self.directory} has no {form} graph, only {', '.join(decoders)}; build it again")
        decoder = decoders[form]
        graph = self.graph(decoder["file"], decoder["weights"])
        self.path(decoder["weights"])
        return graph, decoder["io"]

    def graph(self, name: str, weights: str = "") -> Path:
        """Return the path of an ONNX file, its hash checked, and that it reads no external file but `weights`.

        Args:
            name: the ONNX file.
            weights: the only file its external data may be in; the caller checks its hash. By default none.

        Raises:
            BundleError: see `path`; or it reads another file, whose content is not checked.
        """
        path, mark = self.path(name), f"{name} reads {weights}"
        if mark not in self._checked:
            if path.suffix != ".onnx":  # by the suffix ONNX Runtime picks another file format
                raise BundleError(f"not an ONNX graph: {path} (its name does not end in .onnx); build the bundle again")
            for location in sorted(read_onnx(path).external):
                if normpath(PurePosixPath(name).parent / location) != weights:
                    raise BundleError(
                        f"{path} reads weights from {location!r}, the manifest allows {weights or 'none'}; "
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
