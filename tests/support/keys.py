"""Creates key pairs for signing."""

from pathlib import Path

__all__ = ["write_keys"]


def write_keys(directory: Path) -> tuple[Path, Path] | None:
    """Write a new private and public P-256 key as PEM and return their files; None if `cryptography` is missing."""
    try:
        from cryptography.hazmat.primitives import serialization as pem
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        return None
    key = ec.generate_private_key(ec.SECP256R1())
    directory.mkdir(parents=True, exist_ok=True)
    private, public = directory / "key.pem", directory / "pub.pem"
    private.write_bytes(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo))
    return private, public
