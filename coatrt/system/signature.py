"""Detached signatures of one file, in the bundle format of OpenSSF model signing: DSSE, in-toto, ECDSA on P-256.

`model_signing verify key` accepts them, and those it writes over one file are accepted here. Its library serves
the tests alone: with it come twenty packages, and a device needs one hash and one curve, those of `cryptography`.
"""

import hashlib
import json
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

from coatrt.errors import CoatError, ConfigError
from coatrt.system.json_data import parse_json

__all__ = ["check_signature", "public_key", "sign"]

_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"


def sign(data: bytes, name: str, key: str | Path) -> str:
    """Return the signature of a file, the text of a model.sig, by the private key in a PEM file.

    Raises:
        ConfigError: `cryptography` is not installed, or the key does not serve.
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
    """Return why a signature is not one of this file by this key; empty where it is.

    Args:
        data: content of the file.
        name: of the file; the signature must be of it alone.
        signature: content of the model.sig.
        key: the public key, PEM or a file of it.

    Raises:
        ConfigError: `cryptography` is not installed, or the key does not serve.
    """
    public = _key(key, "public")
    from cryptography.exceptions import InvalidSignature

    try:
        envelope = parse_json(signature, "the signature", "sign again")["dsseEnvelope"]
        payload = b64decode(envelope["payload"], validate=True)
        public.verify(b64decode(envelope["signatures"][0]["sig"], validate=True), _encoded(payload), _ecdsa())
        statement = parse_json(payload, "its payload", "sign again")  # of the key's owner from here on
        told = (envelope["payloadType"], statement["_type"], statement["predicateType"])
        signed = statement["predicate"]["resources"]
    except InvalidSignature:
        return "another key made it, or it was altered"
    except (ValueError, TypeError, LookupError, AttributeError, CoatError):
        return "it is garbled"
    mine = {"name": name, "algorithm": "sha256", "digest": hashlib.sha256(data).hexdigest()}
    return "" if told == (_PAYLOAD, _STATEMENT, _PREDICATE) and signed == [mine] else "it is of another content"


def public_key(key: str | Path) -> bytes:
    """Return the public half of a private key in a PEM file, PEM too.

    Raises:
        ConfigError: `cryptography` is not installed, or the key does not serve.
    """
    private = _key(key, "private")
    from cryptography.hazmat.primitives import serialization as pem

    half: bytes = private.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    return half


def _encoded(payload: bytes) -> bytes:
    """Return what DSSE signs: the payload behind its type, each with its length."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD), _PAYLOAD.encode(), len(payload), payload)


def _key(key: str | Path | bytes, half: str) -> Any:
    """Return a key, refused in one line unless it is of this half and on P-256."""
    try:
        from cryptography.hazmat.primitives import serialization as pem
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise ConfigError(f"signatures need the sign extra ({error}); pip install 'coatrt[sign]'") from None
    try:
        data = key if isinstance(key, bytes) else Path(key).read_bytes()
        found: Any = pem.load_pem_private_key(data, None) if half == "private" else pem.load_pem_public_key(data)
        if not isinstance(getattr(found, "curve", None), ec.SECP256R1):
            raise ValueError("it is on no P-256 curve")
    except Exception as error:  # the library's own share no public base
        reason = getattr(error, "strerror", None) or str(error).partition(".")[0] or type(error).__name__
        where = "the PEM given" if isinstance(key, bytes) else key
        raise ConfigError(
            f"no {half} key to use in {where} ({' '.join(reason.split())}); give a PEM file of a {half} key on P-256, "
            "not encrypted (docs/bundle.md)"
        ) from None
    return found


def _ecdsa() -> Any:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.ECDSA(hashes.SHA256())
