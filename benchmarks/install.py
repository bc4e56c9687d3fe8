"""What an installation costs: seconds, MB and packages of fresh environments, and `coatrt run` to its first token.

python benchmarks/install.py out/demo/rtx-4060   (needs make demo; pip's index for each environment)

Each environment is a fresh venv into which pip installs this checkout, without pip's cache. Then the bundle runs there.
With --before COMMIT the same bundle also runs as that commit did, its code beside the packages of this Python.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coatrt.devices.environment import environment
from coatrt.system.json_data import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
PROMPT = "The state of our finances"
TOKENS = 16
LARGEST = 8


def installed(extras: str, place: Path) -> dict[str, Any]:
    """Install this checkout into a fresh environment, and return what it took."""
    python = place / "bin" / "python"
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    venv = time.monotonic() - started
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    started = time.monotonic()
    target = f"{ROOT}[{extras}]" if extras else str(ROOT)
    subprocess.run([*pip, "install", "--quiet", "--no-cache-dir", target], check=True)
    seconds = time.monotonic() - started
    listed = json.loads(subprocess.run([*pip, "list", "--format", "json"], check=True, capture_output=True).stdout)
    packages = sorted(row["name"] for row in listed if row["name"] not in ("pip", "setuptools"))
    (site,) = place.glob("lib/python*/site-packages")
    folders = {path.name: kilobytes(path) / 1e3 for path in site.iterdir() if path.is_dir()}
    return {
        "extras": extras,
        "command": f"pip install '.[{extras}]'" if extras else "pip install .",
        "venv_seconds": venv,
        "install_seconds": seconds,
        "mb": kilobytes(place) / 1e3,
        "packages": packages,
        "largest_mb": dict(sorted(folders.items(), key=lambda row: -row[1])[:LARGEST]),
        "torch": "torch" in packages,
    }


def kilobytes(path: Path) -> float:
    """Return the space a directory takes by du, in thousands of bytes."""
    done = subprocess.run(["du", "-s", "--block-size=1000", path], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[0])


def first_token(command: Sequence[object], variables: Mapping[str, str]) -> dict[str, float]:
    """Run a command that prints a text token by token; return what it took to the first one, and in all."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **variables, "PYTHONUNBUFFERED": "1"},
            cwd=tempfile.gettempdir(),  # not in the checkout, whose folder coatrt/ would be imported
        )
        assert process.stdout is not None
        begun = process.stdout.read(1)
        process.send_signal(signal.SIGSTOP)  # so that the next token is not counted
        wall = time.monotonic() - started
        fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
        process.send_signal(signal.SIGCONT)
        process.stdout.read()
        _, code, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(code)
        whole = time.monotonic() - started
        if process.returncode or not begun:
            errors.seek(0)
            sys.exit(f"{' '.join(map(str, command))} failed: {errors.read().decode(errors='replace')[-2000:]}")
    resident = next(line.split()[1] for line in status if line.startswith("VmRSS"))
    return {
        "first_token_s": wall,
        "first_token_cpu_s": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        "first_token_mb": int(resident) * 1024 / 1e6,
        "whole_s": whole,
        "whole_cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss * 1024 / 1e6,
    }


def runs(python: Path, bundle: Path, repeat: int, variables: Mapping[str, str] = {}) -> dict[str, Any]:
    """Return the medians of several runs of a bundle, after one that is not counted."""
    command = [python, "-m", "coatrt", "run", bundle, "--prompt", PROMPT, "--max-tokens", TOKENS]
    rows = [first_token(command, variables) for _ in range(repeat + 1)][1:]
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]} | {"repeat": repeat}


def before(commit: str, bundle: Path, work: Path, repeat: int) -> dict[str, Any]:
    """Return the runs of the bundle by the code of an earlier commit, with the packages of this Python."""
    source, site = work / "before", work / "site"
    source.mkdir()
    archive = subprocess.run(["git", "-C", ROOT, "archive", commit], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", source], input=archive, check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--target", site, source], check=True)
    return {"commit": commit, **runs(Path(sys.executable), bundle, repeat, {"PYTHONPATH": str(site)})}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--extras", action="append", help="Repeatable; each is an environment.  [default: cpu]")
    parser.add_argument("--before", metavar="COMMIT")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "install.json")
    given = parser.parse_args()
    bundle = given.bundle.resolve()
    rows = []
    with tempfile.TemporaryDirectory(prefix="coatrt-install-") as folder:
        work = Path(folder)
        for number, extras in enumerate(given.extras or ["cpu"]):
            place = work / f"env{number}"
            row = installed(extras, place)
            has_runtime = {"cpu", "cuda", "all"} & set(extras.split(","))
            row["run"] = runs(place / "bin" / "python", bundle, given.repeat) if has_runtime else None
            rows.append(row)
            print(json.dumps(row, indent=1), flush=True)
        earlier = before(given.before, bundle, work, given.repeat) if given.before else None
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    result = {
        "command": " ".join(["python benchmarks/install.py BUNDLE", *sys.argv[2:]]),
        "model": Path(manifest["model"]["source"]).name,
        "bits": manifest["configuration"]["average_bits"],
        "prompt": PROMPT,
        "tokens": TOKENS,
        "environments": rows,
        "before": earlier,
        "load_average": os.getloadavg()[1],  # over 5 minutes: where it is high, seconds on the clock are too
        "environment": environment(),
    }
    write_json(given.output, result)
    print(json.dumps(earlier, indent=1))


if __name__ == "__main__":
    main()
