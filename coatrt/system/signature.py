"""Detached signatures of one file in the format of OpenSSF model signing: DSSE, in-toto, ECDSA on P-256.

`model_signing verify key` accepts them, and coatrt accepts those it writes over one file. That library is used in tests
only: it needs twenty packages, and a device needs one hash and one curve, those of `cryptography`.
"""

import hashlib
import json
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

from coatrt.errors import CoatError, ConfigError
from coatrt.system.extras import needs
from coatrt.system.json_data import parse_json

__all__ = ["check_signature", "public_key", "sign"]

_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"


def sign(data: bytes, name: str, key: str | Path) -> str:
    """Return the signature of a file, the content of a model.sig, by the private key in a PEM file.

    Raises:
        ConfigError: `cryptography` is not installed, or the key cannot be used.
    """
    private = _key(key, "private")
    digest = hashlib.sha256(data)
    statement = {
        "_type": _STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": hashlib.sha256(digest.digest()).hexdigest()}}],
        "predicateType": _PREDICATE,
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []},
            "resources": [{"name": name, "algorithm": "sha256", "digest": digest.hexdigest()}],
        },
    }
    payload = json.dumps(statement).encode()
    signature = private.sign(_encoded(payload), _ecdsa())
    hint = hashlib.sha256(public_key(key)).hexdigest()
    bundle = {
        "mediaType": _BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": b64encode(payload).decode(),
            "payloadType": _PAYLOAD,
            "signatures": [{"sig": b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return json.dumps(bundle)


def check_signature(data: bytes, name: str, signature: bytes, key: str | Path | bytes) -> str:
    """Return why a signature of a file is not valid for a key; "" where it is valid.

    Args:
        data: content of the file.
        name: its name; the signature must cover this file alone.
        signature: content of model.sig.
        key: the public key, PEM or the path of a PEM file.

    Raises:
        ConfigError: `cryptography` is not installed, or the key cannot be used.
    """
    public = _key(key, "public")
    from cryptography.exceptions import InvalidSignature

    try:
        envelope = parse_json(signature, "the signature", "sign again")["dsseEnvelope"]
        payload = b64decode(envelope["payload"], validate=True)
        public.verify(b64decode(envelope["signatures"][0]["sig"], validate=True), _encoded(payload), _ecdsa())
        statement = parse_json(payload, "its payload", "sign again")  # written by the key's owner, as now verified
        types = (envelope["payloadType"], statement["_type"], statement["predicateType"])
        resources = statement["predicate"]["resources"]
    except InvalidSignature:
        return "signed by another key, or altered"
    except (ValueError, TypeError, LookupError, AttributeError, CoatError):
        return "malformed signature"
    expected = {"name": name, "algorithm": "sha256", "digest": hashlib.sha256(data).hexdigest()}
    return (
        "" if types == (_PAYLOAD, _STATEMENT, _PREDICATE) and resources == [expected] else "signature of another file"
    )


def public_key(key: str | Path) -> bytes:
    """Return the public key, as PEM, of a private key in a PEM file.

    Raises:
        ConfigError: `cryptography` is not installed, or the key cannot be used.
    """
    private = _key(key, "private")
    from cryptography.hazmat.primitives import serialization as pem

    half: bytes = private.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    return half


def _encoded(payload: bytes) -> bytes:
    """Return the bytes that DSSE signs: the type and the payload, each preceded by its length."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD), _PAYLOAD.encode(), len(payload), payload)


def _key(key: str | Path | bytes, half: str) -> Any:
    """Return a private or public key; any other is refused in one line, as is one that is not on P-256."""
    try:
        from cryptography.hazmat.primitives import serialization as pem
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise ConfigError(needs("a signature", "sign")) from None
    try:
        data = key if isinstance(key, bytes) else Path(key).read_bytes()
        loaded: Any = pem.load_pem_private_key(data, None) if half == "private" else pem.load_pem_public_key(data)
        if not isinstance(getattr(loaded, "curve", None), ec.SECP256R1):
            raise ValueError("its curve is not P-256")
    except Exception as error:  # the library's exceptions share no public base class
        cause = getattr(error, "strerror", None) or str(error).partition(".")[0] or type(error).__name__
        where = "the PEM" if isinstance(key, bytes) else key
        raise ConfigError(
            f"not a usable {half} key: {where} ({' '.join(cause.split())}); give a PEM file with a {half} key on "
            "P-256, not encrypted (docs/concepts/security.md)"
        ) from None
    return loaded


def _ecdsa() -> Any:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.ECDSA(hashes.SHA256())
