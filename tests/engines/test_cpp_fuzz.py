"""The fuzz targets, compiled with sanitizers and run on mutated seeds: thousands here, more by fuzz.sh."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

CPP = Path(__file__).parent / "cpp"
RUNS = {"manifest": 1000, "safetensors": 4000, "tokenizer": 1500, "request": 3000}


def write_seeds(directory: Path) -> list[str]:
    spec = importlib.util.spec_from_file_location("fuzz_seeds", CPP / "fuzz_seeds.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: list[str] = module.write(directory)
    return found


def test_every_target_has_seeds(tmp_path: Path) -> None:
    assert (
        sorted(write_seeds(tmp_path))
        == sorted(RUNS)
        == sorted(p.stem[5:] for p in CPP.glob("fuzz_*.cpp") if p.stem != "fuzz_main")
    )


@pytest.mark.parametrize("target", RUNS)
def test_no_input_breaks_a_reader(cpp: Any, tmp_path: Path, target: str) -> None:
    write_seeds(tmp_path)
    done = cpp.run(f"fuzz_{target}", tmp_path / target, RUNS[target])
    assert done.returncode == 0, done.stderr[-4000:]
    assert f" seeds, {RUNS[target]} runs" in done.stdout
