"""The house: imports run downwards, the built wheel holds every room, the code hash covers what writes bundles."""

import ast
import itertools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from coatrt.engines.bundles.fingerprint import WRITERS, code_hash

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"coatrt": ROOT / "coatrt", "coatrt.export": ROOT / "export", "coatrt.engines": ROOT / "engines"}

FLOORS = (
    {"coatrt.errors"},
    {"coatrt.system"},
    {"coatrt.data"},
    {"coatrt.models"},
    {"coatrt.quantization"},
    {"coatrt.configs", "coatrt.devices"},
    {"coatrt.bundle", "coatrt.evaluation"},
    {"coatrt.adapter"},
    {"coatrt.export"},
    {"coatrt.planning"},
    {"coatrt.training", "coatrt.searching", "coatrt.reporting"},
    {"coatrt.engines.runtime", "coatrt.engines.builders"},
    {"coatrt.engines.bundles", "coatrt.engines.measure", "coatrt.engines.serving"},
    {"coatrt.engines.genai"},
    {"coatrt.cli"},
    {"coatrt.__main__"},
)
"""Rooms and root modules, bottom floor first: each imports only from floors below its own, and from itself."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FRONT_DOOR = "coatrt"
"""The front door names everything, lazily; from inside only its version is read."""


def modules() -> dict[str, Path]:
    """Return every module of the three packages by its import name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def room_of(module: str) -> str:
    """Return the room, or the root module, that a module lies in."""
    parts = module.split(".")
    return ".".join(parts[: 3 if parts[:2] == ["coatrt", "engines"] else 2])


def imports(module: str) -> set[str]:
    """Return the modules of the three packages that a module imports anywhere, for types only or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; give the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "coatrt":
                while name not in MODULES:
                    name = name.rpartition(".")[0]
                found.add(name)
    return found - {module}


IMPORTS = {module: imports(module) for module in MODULES}


def test_every_module_lies_in_a_room() -> None:
    packages = {"coatrt", "coatrt.export", "coatrt.engines"}
    assert {room_of(module) for module in MODULES if module not in packages} | {"coatrt.export"} == set(FLOOR)


def test_imports_run_downwards() -> None:
    upwards = []
    for module, names in IMPORTS.items():
        for name in names - {FRONT_DOOR}:
            here, there = room_of(module), room_of(name)
            if module != FRONT_DOOR and here != there and FLOOR[there] >= FLOOR[here]:
                upwards.append(f"{module} imports {name}")
    assert not upwards, "\n".join(sorted(upwards))


def test_no_file_imports_itself_through_others() -> None:
    below: dict[str, set[str]] = {}

    def reach(module: str, path: tuple[str, ...]) -> set[str]:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in below:
            names = [name for name in IMPORTS[module] if name != FRONT_DOOR]
            below[module] = set(names).union(*(reach(name, (*path, module)) for name in names))
        return below[module]

    for module in set(MODULES) - {FRONT_DOOR}:
        reach(module, ())


def test_from_inside_only_the_version_is_read_at_the_front_door() -> None:
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "coatrt":
                assert [alias.name for alias in node.names] == ["__version__"], module


def test_rooms_hold_only_a_docstring_in_their_init() -> None:
    """`plan`, `adapt` and `run` promise not to import torch: a room that imported its files would break that."""
    for module, path in MODULES.items():
        if path.name == "__init__.py" and module not in {FRONT_DOOR, "coatrt.export.weights"}:
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert len(body) == 1 and isinstance(body[0], ast.Expr), f"{module} does more than say what it is"


def test_files_are_short_and_few_lie_beside_the_rooms() -> None:
    for folder in ("coatrt", "export", "engines", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= 350, f"{path.relative_to(ROOT)} has {lines} lines; a file holds one idea, 350 lines at most"
    beside = [path.name for path in (ROOT / "coatrt").iterdir() if path.is_file()]
    assert len(beside) <= 6, beside


OF_NO_ONE_MODULE = {
    "campaigns/test_configs": "models that say something odd",
    "campaigns/test_kills": "commands that are killed",
    "campaigns/test_situations": "disks that are full, signals, no home",
    "campaigns/test_mutations": "a short campaign of mutated inputs",
    "coatrt/cli/test_extras": "commands without optional packages",
    "coatrt/cli/test_offline": "commands without a network",
    "coatrt/cli/test_options": "the numbers of all commands",
    "coatrt/system/test_cache": "a cache that cannot be written",
    "coatrt/reporting/test_report": "the report as a whole",
    "coatrt/quantization/test_refined": "the quantizer refined as a whole",
    "coatrt/training/test_precision": "bfloat16, from the base to the adapter",
    "coatrt/training/test_pretended_device": "training and search on a device that is not the CPU",
    "coatrt/training/test_altered_state": "a training state that was altered",
    "engines/bundles/test_trust": "whom a bundle is believed",
    "engines/runtime/test_trt_commands": "bench, run and verify on an engine",
    **{
        f"engines/conformance/test_{name}": "servers that speak OpenAI's protocol"
        for name in ("chat", "completions", "lifecycle", "models", "refusals", "sampling", "stop", "streams")
    },
    "engines/test_cpp_cuda": "the C++ library's backend cuda",
    "engines/test_cpp_examples": "the C++ programs of examples/",
    "engines/test_cpp_signature": "signatures in C++",
    "engines/test_cpp_fuzz": "the readers of the C++ library and the service",
    "engines/test_cpp_guards": "what the C++ library does not read or write",
    "engines/test_cpp_headers": "where CMake finds the headers of the C++ library",
    "engines/test_cpp_patterns": "the C++ library's globs and regular expressions",
    "engines/test_cpp_service": "the C++ service under attack",
    "engines/test_cpp_tokenizer": "the C++ library's tokenizer",
    "engines/bundles/test_families": "families unlike Llama, from training to a bundle",
    "export/test_files": "the files that an export leaves",
    "export/test_rtx": "graphs as TensorRT-RTX takes them",
    "coatrt/test_init": "the front door",
    "test_install": "what pip installs for each use",
    "test_docs_run": "the code blocks of the documents",
    "test_docs_words": "phrases of documents, messages and docstrings",
    "test_flips": "the campaign of flipped bytes",
    "test_rooms": "the rooms",
}


def test_tests_lie_where_their_modules_do() -> None:
    others = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        name = path.relative_to(ROOT / "tests").with_suffix("").as_posix()
        module = ROOT / name.replace("test_", "")
        if not (module.with_suffix(".py").is_file() or module.is_dir()):
            others.add(name)
    assert others == set(OF_NO_ONE_MODULE)


# What decides only which bundle is made: the plan itself, and the adapter's files, are hashed as content.
NOT_WRITERS = {"coatrt.errors", "coatrt.data", "coatrt.evaluation", "coatrt.planning"}


def test_the_code_hash_covers_every_room_that_writes_bundles() -> None:
    seen, waiting = set(), {"coatrt.engines.bundles.build"}
    while waiting:
        module = waiting.pop()
        seen.add(module)
        waiting |= IMPORTS[module] - seen - {FRONT_DOOR}
    rooms = {room_of(module) for module in seen}
    assert rooms - NOT_WRITERS == set(WRITERS)


def test_a_changed_byte_in_each_room_that_writes_bundles_changes_the_code_hash(tmp_path: Path) -> None:
    for package, folder in PACKAGES.items():
        shutil.copytree(folder, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))

    def place(name: str) -> Path:
        package = max((p for p in PACKAGES if name == p or name.startswith(f"{p}.")), key=len)
        path = tmp_path.joinpath(package, *name[len(package) + 1 :].split("."))
        return path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"

    def hashed() -> str:
        return code_hash(map(place, WRITERS))

    def changed(path: Path) -> bool:
        before, content = hashed(), path.read_bytes()
        path.write_bytes(content.replace(b"e", b"E", 1))
        after = hashed()
        path.write_bytes(content)
        assert hashed() == before
        return after != before

    for name in WRITERS:
        origin = place(name)
        files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
        assert all(map(changed, files)), name
    assert len(list((tmp_path / "coatrt.export" / "weights").glob("*.py"))) > 3  # a subfolder was among them
    for path in itertools.chain((tmp_path / "coatrt/reporting").glob("*.py"), (tmp_path / "coatrt/cli").glob("*.py")):
        assert not changed(path), path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    source = tmp_path_factory.mktemp("source")
    kept = ("coatrt", "export", "engines")
    for name in kept:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        return [name for name in opened.namelist() if ".dist-info/" not in name]


def test_the_wheel_holds_every_room(wheel: list[str]) -> None:
    expected = set()
    for package, folder in PACKAGES.items():
        place = Path(*package.split("."))
        names = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "."],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
        expected |= {(place / name).as_posix() for name in names.stdout.split("\n") if name}
    assert set(wheel) == expected
