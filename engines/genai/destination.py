"""Where an export for onnxruntime-genai may be written, and the list of its files' hashes."""

from pathlib import Path

from coatrt.errors import ConfigError
from coatrt.system.files import check_replaceable, sha256_file, write_text
from coatrt.system.scratch import restore

__all__ = ["SUMS", "check_destination", "write_sums"]

SUMS = "SHA256SUMS"
"""`sha256sum --check` reads it."""
_SHOWN = 3


def write_sums(directory: Path) -> int:
    """Write the SHA-256 of every file below a directory and return the bytes of all of them."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    lines = [f"{sha256_file(path)}  {path.relative_to(directory).as_posix()}\n" for path in files]
    write_text(directory / SUMS, "".join(lines))
    return sum(path.stat().st_size for path in files)


def check_destination(output: Path, *, overwrite: bool) -> None:
    """Refuse an output directory that is not empty, unless it is an export that may be replaced.

    An export is known by its SHA256SUMS, which name every file in it.

    Raises:
        ConfigError: the directory has other files, or an export without `overwrite`; or see `check_replaceable`.
    """
    restore(output)
    check_replaceable(output)
    if not output.is_dir() or not any(output.iterdir()):
        return
    others = [name for name in _names(output) if name not in {SUMS, *_listed(output)}]
    if others:
        sample = ", ".join(others[:_SHOWN]) + (", …" if len(others) > _SHOWN else "")
        raise ConfigError(f"{output} holds other files ({sample}); give a new directory")
    if not overwrite:
        raise ConfigError(f"{output} holds an export; give a new directory, or --overwrite to replace it")


def _names(directory: Path) -> list[str]:
    return [
        path.relative_to(directory).as_posix()
        for path in sorted(directory.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    ]


def _listed(directory: Path) -> set[str]:
    try:
        lines = (directory / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return set()
    return {line[66:] for line in lines if line[64:66] == "  "}
