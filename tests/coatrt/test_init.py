"""The front door: every name is there, typed, lazy; documents and examples go through it and by no other way."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import coatrt

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "coatrt" / "__init__.pyi"


def names() -> dict[str, str]:
    """Return name → module, as the stub has them for type checkers and for the door itself."""
    imports = [node for node in ast.parse(STUB.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"coatrt.{node.module}" for node in imports for alias in node.names}


def test_names_are_those_of_the_stub() -> None:
    assert set(coatrt.__all__) == {"__version__", *names()}


def test_no_name_is_a_room_too() -> None:
    """Importing a room sets the attribute of its name, and would hide the function."""
    rooms = {path.parent.name for path in (ROOT / "coatrt").glob("*/__init__.py")} | {
        "export",
        "engines",
        "bundle",
        "errors",
    }
    assert not rooms & set(coatrt.__all__)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="assemble"):
        coatrt.assemble  # noqa: B018


def test_every_name_is_defined_where_the_door_says() -> None:
    for name, module in names().items():
        parts = module.split(".")
        path = ROOT.joinpath(*(parts[1:] if parts[1] in ("export", "engines") else parts)).with_suffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert name in defined, f"{name} is not defined in {path}"


@pytest.mark.parametrize("what", ["", "from coatrt.cli.main import cli; cli(['--help'], standalone_mode=False)"])
def test_neither_the_import_nor_the_help_loads_anything_heavy(what: str) -> None:
    program = f"import sys, coatrt; {what or 'dir(coatrt)'}; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "onnxruntime", "msgspec", "matplotlib", "transformers"} & set(done.stderr.split())


def python_blocks(path: Path) -> list[str]:
    """Return the Python that a file shows or is."""
    text = path.read_text(encoding="utf-8")
    return [text] if path.suffix == ".py" else re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.mark.parametrize("path", [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.py")], ids=str)
def test_documents_and_examples_use_the_front_door_alone(path: Path) -> None:
    for block in python_blocks(path):
        for node in ast.walk(ast.parse(block)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                if name.split(".")[0] == "coatrt":
                    assert name in {"coatrt", *(f"coatrt.{known}" for known in coatrt.__all__)}, f"{path.name}: {name}"
    if path.suffix == ".md":
        for name in re.findall(r"`coatrt\.(\w+)[`(]", path.read_text(encoding="utf-8")):
            assert name in coatrt.__all__, f"{path.name} names coatrt.{name}"


def test_every_name_can_be_imported() -> None:
    pytest.importorskip("torch")
    for name in coatrt.__all__:
        assert getattr(coatrt, name) is not None
    assert coatrt.train is importlib.import_module("coatrt.training.run").train


def test_a_checkout_that_is_not_installed_is_imported_whole() -> None:
    """Python takes the folder `coatrt` of the working directory for the package, whatever is installed."""
    program = (
        "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)];"
        "import coatrt.engines.bundles.options as options; print(options.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert Path(done.stdout.strip()) == ROOT / "engines" / "bundles" / "options.py"
