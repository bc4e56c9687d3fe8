"""Without optional packages every command works, or names the extra that brings what it needs in one line."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import coatrt
from coatrt.cli.main import _COMMANDS, cli
from coatrt.errors import CoatError
from coatrt.system.extras import EXTRAS, ExtraError, extra_of, needs, require
from support.keys import write_keys
from support.tiny import TEXTS
from support.without_packages import run_without

SIZES = ("--context", "64", "--prefill", "16")
TRAINING = (
    *("--formats", "nf3-g32,int8", "--steps", "1", "--batch", "2", "--max-length", "32", "--calibration", "2"),
    *("--evaluation", "2", "--budgets", "5", "--quantizer", "mse"),
)
TABLE: dict[str, tuple[str, tuple[str, ...]]] = {
    "devices": ("devices", ()),
    "devices probe": ("devices probe", ()),
    "plan": ("plan ADAPTER --target rtx-4090 --bits 5", ()),
    "build, up to date": (f"build ADAPTER --target rtx-4090 -o BUNDLE --no-engine {' '.join(SIZES)}", ()),
    "build, dry": ("build ADAPTER --target l4 -o NEW --dry-run", ()),
    "adapt": ("adapt BUNDLE -o NEW.safetensors", ("cpu",)),
    "adapt, peft": ("adapt BUNDLE -o NEW.peft --format peft", ("cpu",)),
    "adapt, onnx-adapter": ("adapt BUNDLE -o NEW.onnx_adapter --format onnx-adapter", ("cpu",)),
    "export, genai": ("export BUNDLE --format genai -o NEW.genai", ("cpu",)),
    "export, ortpackage": ("export BUNDLE --format ortpackage -o NEW.ortpackage", ("cpu",)),
    "run": ("run BUNDLE -p cat --max-tokens 4 --context 64", ("cpu",)),
    "run, chat": ("run BUNDLE -p cat --max-tokens 4 --context 64 --chat", ("cpu",)),
    "chat": ("chat BUNDLE --context 64 -n 2", ("cpu",)),
    "serve": ("serve BUNDLE --port 0", ("serve", "cpu")),
    "bench": ("bench BUNDLE --prompt 4 --tokens 2 --repeat 1", ("cpu",)),
    "verify": ("verify BUNDLE", ("cpu",)),
    "lm-eval": ("lm-eval --model coatrt --model_args bundle=BUNDLE --tasks hellaswag", ("eval", "cpu")),
    "cmake-dir": ("cmake-dir", ()),
    "cmake-dir of the runtime": ("cmake-dir --onnxruntime", ("cpu",)),
    "report": ("report BUNDLE -o NEW.html", ("report",)),
    "verify, model": ("verify BUNDLE --model MODEL", ("train", "cpu")),
    "verify, key": ("verify BUNDLE --key PUBLIC --no-torch", ("sign", "cpu")),
    "train": (f"train MODEL --data TEXT -o NEW {' '.join(TRAINING)}", ("train", "cpu")),
    "search": ("search COPY --data TEXT --evaluations 2 --blocks 1 --max-length 32", ("train", "cpu")),
    "export": ("export ADAPTER --config CONFIG -o NEW.export", ("train", "cpu")),
    "export, compressed-tensors": (
        "export ADAPTER --config CONFIG -o NEW.tensors --format compressed-tensors",
        ("train",),
    ),
    "export, gguf": ("export ADAPTER --config CONFIG -o NEW.gguf --format gguf", ("gguf", "train")),
    "build": ("build ADAPTER --target l4 -o NEW.bundle --no-engine", ("train", "cpu")),
    "build, signed": ("build ADAPTER --target l4 -o NEW.signed --no-engine --sign PRIVATE", ("sign", "train", "cpu")),
    "build, engine": ("build ADAPTER --target rtx-4090 -o NEW.engine", ("rtx", "train", "cpu")),
    "devices calibrate": ("devices calibrate ADAPTER", ("train", "cpu")),
    "train, GGUF": ("train GGUF --data TEXT -o NEW.gguf", ("gguf", "train", "cpu")),
}
"""Name → command, and the extras it needs."""
NOT_DONE = ("serve", "lm-eval", "build, signed", "build, engine", "devices calibrate", "train, GGUF")
"""What is long or has tests of its own: only what it says without its packages is looked at."""
ALL = {module: extra for extra, modules in EXTRAS.items() for module in modules}


def cases() -> list[tuple[tuple[str, ...], str]]:
    """Return (packages that are not importable, command): none it needs first, then each that it needs alone."""
    found: list[tuple[tuple[str, ...], str]] = [((), "build, up to date")]
    for name, (_, extras) in TABLE.items():
        needed = {module for extra in extras for module in EXTRAS[extra]}
        if name not in NOT_DONE:
            found.append((tuple(module for module in ALL if module not in needed), name))
    for name, (_, extras) in TABLE.items():
        if name == "lm-eval" and find_spec("lm_eval") is None:  # 470 MB: a test of its own looks at the message
            continue
        found += [((module,), name) for extra in extras for module in EXTRAS[extra]]
    return sorted(found, key=lambda case: not (case[0] == () or "torch" in case[0]))  # before torch is loaded


@pytest.fixture(scope="module")
def answers(
    tiny_llama: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[tuple[str, ...], str], dict[str, Any]]:
    """What became of every case."""
    work = tmp_path_factory.mktemp("extras")
    places = {"ADAPTER": tiny_adapter, "BUNDLE": work / "bundle", "MODEL": tiny_llama, "TEXT": work / "text.txt"}
    places |= {"CONFIG": work / "config.json", "GGUF": work / "model.gguf", "COPY": work / "copy"}
    keys = write_keys(work)
    assert keys is not None
    places["PRIVATE"], places["PUBLIC"] = keys
    places["TEXT"].write_text("\n\n".join(TEXTS))
    places["CONFIG"].write_text('{"default": "int8"}')
    places["GGUF"].write_bytes(b"GGUF")
    for command in (TABLE["build, up to date"][0], f"train MODEL --data TEXT -o COPY {' '.join(TRAINING)}"):
        words = [str(places.get(word, word)) for word in command.split()]
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, (result.output, result.exception)
    coatrt.Bundle.open(places["BUNDLE"]).sign(places["PRIVATE"])
    found = cases()
    commands = []
    for number, (packages, name) in enumerate(found):
        words = [word.replace("NEW", str(work / f"new-{number}")) for word in TABLE[name][0].split()]
        commands.append((packages, [str(places.get(word, word)) for word in words]))
    return dict(zip(found, run_without(commands, work), strict=True))


def test_every_command_is_in_the_table() -> None:
    assert {text.split()[0] for text, _ in TABLE.values()} == set(_COMMANDS)


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case[1]} without {'+'.join(case[0])[:30]}")
def test_a_command_works_or_names_its_extra(
    case: tuple[tuple[str, ...], str], answers: dict[tuple[tuple[str, ...], str], dict[str, Any]]
) -> None:
    (packages, name), answer = case, answers[case]
    needed = [module for module in packages if ALL[module] in TABLE[name][1]]
    if not needed and packages != ("polygraphy",):
        assert answer["code"] == 0, answer
        assert not answer["torch"] or "train" in TABLE[name][1]
        return
    (module,) = packages
    assert answer["code"] == 2, answer
    (line,) = answer["err"].splitlines()
    # eval is not in all: where it is not installed, it is missing too
    missing = {e: [p for m, p in EXTRAS[e].items() if m == module or find_spec(m) is None] for e in TABLE[name][1]}
    *others, last = [package for packages in missing.values() for package in packages]
    named = " and ".join([*([", ".join(others)] if others else []), last])
    assert f" needs {named}: pip install '.[{','.join(e for e in missing if missing[e])}]'" in line
    assert line.startswith("coatrt: ") and "in a checkout of coatrt" in line


def test_an_idle_build_imports_no_torch(
    answers: dict[tuple[tuple[str, ...], str], dict[str, Any]],
) -> None:
    answer = answers[(), "build, up to date"]
    assert "up to date" in answer["out"]
    assert not answer["torch"]


def test_an_idle_build_in_python_imports_no_torch(tiny_adapter: Path, tmp_path: Path) -> None:
    options = coatrt.BundleOptions(context=64, engine=False)
    coatrt.build(tiny_adapter, ["rtx-4090"], tmp_path / "bundle", options=options)
    program = (
        "import json, sys, coatrt\n"
        "options = coatrt.BundleOptions(context=64, engine=False)\n"
        "(row,) = coatrt.build(sys.argv[1], ['rtx-4090'], sys.argv[2], options=options)\n"
        "print(json.dumps([row.state, sorted({'torch', 'transformers', 'onnxruntime'} & set(sys.modules))]))"
    )
    command = [sys.executable, "-c", program, str(tiny_adapter), str(tmp_path / "bundle")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == ["current", []]


def test_a_verification_without_torch_says_what_it_left_out(
    answers: dict[tuple[tuple[str, ...], str], dict[str, Any]],
) -> None:
    (answer,) = [answer for (packages, name), answer in answers.items() if name == "verify" and "torch" in packages]
    assert "the numerical comparison needs torch, transformers, accelerate and onnx-ir: pip install" in answer["out"]


def test_the_front_door_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(coatrt, "_load", missing)
    with pytest.raises(ExtraError, match=r"^coatrt\.Frob needs .*: pip install '\.\[train\]' in a checkout of coatrt$"):
        coatrt.Frob  # noqa: B018
    assert issubclass(ExtraError, CoatError)


def test_the_line_names_what_is_missing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"torch", "onnx_ir"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in here else None)
    line = "coatrt train needs transformers and accelerate: pip install '.[train]' in a checkout of coatrt"
    assert needs("coatrt train", "train") == line
    with pytest.raises(ExtraError, match=r"^coatrt run needs onnxruntime: .*; with an NVIDIA GPU take cuda"):
        require("coatrt run", "cpu")
    with pytest.raises(
        ExtraError, match=r"needs transformers, accelerate and onnxruntime: pip install '\.\[train,cpu\]'"
    ):
        require("coatrt train", "train", "cpu")
    assert extra_of(ModuleNotFoundError(name="torch.nn")) == "train"
    assert extra_of(ModuleNotFoundError(name="frobnicate")) is None
    assert extra_of(ImportError(name="torch")) is None
