"""Where a bundle may be written: a new or empty directory, or one that holds a bundle and nothing else."""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from coatrt.bundle import MANIFEST
from coatrt.errors import ConfigError
from coatrt.system.files import check_replaceable
from coatrt.system.json_data import read_as

__all__ = ["check_output", "holds_bundle"]

_SHOWN = 3


class _Marks(TypedDict):  # by which a manifest is known, of whatever version
    format: Any
    coatrt: Any
    files: dict[str, Any]


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output directory that holds something, unless it is a bundle that may be replaced.

    A bundle is known by its manifest, damaged or not. What cannot be renamed is refused too: the finished bundle takes
    its place.

    Raises:
        ConfigError: it does, or see `check_replaceable`.
    """
    check_replaceable(output)
    if not output.is_dir() or not any(output.iterdir()):
        return
    named = _named(output)
    others = _others(output, named) if named is not None else sorted(path.name for path in output.iterdir())
    if others:
        some = ", ".join(others[:_SHOWN]) + (", …" if len(others) > _SHOWN else "")
        raise ConfigError(f"{output} holds other files ({some}); give a new directory")
    if not overwrite:
        raise ConfigError(f"{output} holds a bundle; give a new directory, or --overwrite to replace it")


def holds_bundle(directory: Path) -> bool:
    """Return whether a directory has a bundle's manifest; another program's manifest.json is none."""
    return (directory / MANIFEST).is_file() and _named(directory) is not None


def _named(directory: Path) -> set[str] | None:
    """Return the files that a bundle's manifest names; None where the directory has no manifest of ours."""
    try:
        manifest = read_as(directory / MANIFEST, _Marks, "bundle manifest", "build the bundle again")
    except ConfigError:
        return None
    return set(manifest["files"])


def _others(directory: Path, named: Iterable[str]) -> list[str]:
    """Return what is there beside a bundle's own files, a directory without what it holds."""
    files = {MANIFEST, *named}
    if "build.json" in files:  # what the build kit leaves where it is stopped
        files.add(f"{MANIFEST}.part")
        files |= {path.name for ending in ("part", "engine") for path in directory.glob(f"sm[0-9]*.{ending}")}
    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents}
    others: list[str] = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        ours = name in folders if path.is_dir() and not path.is_symlink() else name in files
        if not ours and not (others and name.startswith(f"{others[-1]}/")):
            others.append(name)
    return others
