"""Signatures: of one content by one key, in OpenSSF's format for models, as its own library reads and writes it."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from coatrt.errors import ConfigError
from coatrt.system.signature import check_signature, public_key, sign
from support.keys import write_keys

pytest.importorskip("cryptography", reason="needs the sign extra")

DATA = b'{"files": {}}'


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    made = write_keys(tmp_path_factory.mktemp("keys"))
    assert made is not None
    return made


def test_a_signature_is_of_one_content_name_and_key(keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    signature = sign(DATA, "manifest.json", private).encode()
    assert check_signature(DATA, "manifest.json", signature, public) == ""
    assert check_signature(DATA, "manifest.json", signature, public_key(private)) == ""
    assert check_signature(DATA + b" ", "manifest.json", signature, public) == "signature of another file"
    assert check_signature(DATA, "other.json", signature, public) == "signature of another file"
    other = write_keys(tmp_path)
    assert other is not None
    assert check_signature(DATA, "manifest.json", signature, other[1]) == "signed by another key, or altered"


def _enveloped(signature: bytes, change: Any) -> bytes:
    bundle = json.loads(signature)
    change(bundle["dsseEnvelope"])
    return json.dumps(bundle).encode()


def test_an_altered_signature_is_none(keys: tuple[Path, Path]) -> None:
    private, public = keys
    signature = sign(DATA, "manifest.json", private).encode()

    def claims(envelope: Any) -> None:
        payload = json.loads(base64.b64decode(envelope["payload"]))
        payload["predicate"]["resources"][0]["digest"] = "0" * 64
        envelope["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()

    for change in (
        claims,
        lambda envelope: envelope.update(payload=""),
        lambda envelope: envelope.update(payloadType="text/plain"),
        lambda envelope: envelope.update(signatures=[]),
        lambda envelope: envelope["signatures"][0].update(sig="AAAA"),
        lambda envelope: envelope["signatures"][0].update(sig=5),
    ):
        assert check_signature(DATA, "manifest.json", _enveloped(signature, change), public) != ""
    twice = b'{"dsseEnvelope": {}, ' + signature[1:]
    for garbage in (twice, b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000):
        assert check_signature(DATA, "manifest.json", garbage, public) == "malformed signature"


def test_keys_that_do_not_serve_are_one_line(keys: tuple[Path, Path], tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    private, public = keys
    plain = (pem.Encoding.PEM, pem.PrivateFormat.PKCS8)
    files = {"garbage": b"x", "ed25519": ed25519.Ed25519PrivateKey.generate().private_bytes(*plain, pem.NoEncryption())}
    key = ec.generate_private_key(ec.SECP256R1())
    files["locked"] = key.private_bytes(*plain, pem.BestAvailableEncryption(b"secret"))
    files["p384"] = ec.generate_private_key(ec.SECP384R1()).private_bytes(*plain, pem.NoEncryption())
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for path in (*(tmp_path / name for name in files), tmp_path / "none", tmp_path, public):
        with pytest.raises(
            ConfigError, match=r"not a usable private key: .*; give a PEM file with a private key on P-256"
        ) as error:
            sign(DATA, "a", path)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="not a usable public key: "):
        check_signature(DATA, "a", b"", private)


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, keys: tuple[Path, Path]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(ConfigError, match=r"needs cryptography: pip install '\.\[sign\]'"):
        sign(DATA, "a", keys[0])


def test_openssf_model_signing_reads_and_writes_the_same(keys: tuple[Path, Path], tmp_path: Path) -> None:
    signing = pytest.importorskip("model_signing.signing")
    verifying = pytest.importorskip("model_signing.verifying")
    private, public = keys
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "manifest.json").write_bytes(DATA)
    signing.Config().use_elliptic_key_signer(private_key=private).sign(folder, tmp_path / "theirs.sig")
    assert check_signature(DATA, "manifest.json", (tmp_path / "theirs.sig").read_bytes(), public) == ""
    (folder / "model.sig").write_text(sign(DATA, "manifest.json", private))
    (folder / "weights.bin").write_bytes(b"named by the manifest")

    def theirs() -> None:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public)
        verifier.set_ignore_unsigned_files(True).verify(folder, folder / "model.sig")

    theirs()
    (folder / "manifest.json").write_bytes(DATA + b" ")
    with pytest.raises(ValueError, match="Hash mismatch"):
        theirs()
