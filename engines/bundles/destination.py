"""Checks where a bundle may be written: a new or empty directory, or one with a bundle and nothing else."""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from coatrt.bundle import MANIFEST, SIGNATURE
from coatrt.errors import ConfigError
from coatrt.system.files import check_replaceable
from coatrt.system.json_data import read_as

__all__ = ["check_output", "holds_bundle"]

_SHOWN = 3


class _Marks(TypedDict):  # keys that identify a bundle's manifest of any version
    format: Any
    coatrt: Any
    files: dict[str, Any]


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output directory that is not empty, unless it is a bundle that may be replaced.

    A bundle is identified by its manifest, even a damaged one. A directory that cannot be renamed is refused too, as
    the new bundle replaces it by renaming.

    Raises:
        ConfigError: the directory has other files, or a bundle without `overwrite`; or see `check_replaceable`.
    """
    check_replaceable(output)
    if not output.is_dir() or not any(output.iterdir()):
        return
    own = _manifest_files(output)
    others = _other_files(output, own) if own is not None else sorted(path.name for path in output.iterdir())
    if own is None and _holds_bundles_only(output):
        raise ConfigError(f"{output} holds bundles; give a new directory in it, such as {output / 'l4'}")
    if others:
        sample = ", ".join(others[:_SHOWN]) + (", …" if len(others) > _SHOWN else "")
        raise ConfigError(f"{output} holds other files ({sample}); give a new directory")
    if not overwrite:
        raise ConfigError(f"{output} holds a bundle; give a new directory, or --overwrite to replace it")


def holds_bundle(directory: Path) -> bool:
    """Return whether a directory has a bundle's manifest; another program's manifest.json does not count."""
    return (directory / MANIFEST).is_file() and _manifest_files(directory) is not None


def _holds_bundles_only(directory: Path) -> bool:
    """Return whether a directory holds bundles, and nothing else but what was measured of them."""
    names = {path.name for path in directory.iterdir() if path.is_dir() and holds_bundle(path)}
    beside = {f"{name}.{kind}.json" for name in names for kind in ("quality", "bench")}
    return bool(names) and {path.name for path in directory.iterdir()} <= names | beside


def _manifest_files(directory: Path) -> set[str] | None:
    """Return the files listed in a bundle's manifest; None if the directory has no such manifest."""
    try:
        manifest = read_as(directory / MANIFEST, _Marks, "bundle manifest", "build the bundle again")
    except ConfigError:
        return None
    return set(manifest["files"])


def _other_files(directory: Path, own: Iterable[str]) -> list[str]:
    """Return files and directories that are not the bundle's own; of a directory's content only the directory."""
    files = {MANIFEST, SIGNATURE, *own}
    if "build.json" in files:  # leftovers of an interrupted build kit count as the bundle's own
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
