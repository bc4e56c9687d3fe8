"""The check of a GPU: ONNX Runtime, coatrt and torch, in ten minutes.

    python benchmarks/gpu/coatrt_parts.py graphs                                             # needs no GPU
    python benchmarks/gpu/coatrt_parts.py smollm2 --model smollm2 --formats int4-g64,fp16    # needs no GPU
    python benchmarks/gpu/check.py --out rows --graphs graphs,smollm2
    python benchmarks/gpu/collect.py rows                                                    # one JSON file

Each section is a separate process that writes OUT/SECTION.jsonl row by row. A section that loses its CUDA context is
restarted and skips the row that caused it. Rows of an earlier run stay and are not measured again, so a run can be
split into several. graphs.py, backend.py, calibrate.py, cpp.py and training.py need coatrt, encoding.py only its
quantization room; no other section needs it. cpp.py compiles the C++ library, and linear.py compiles the operator of
kernels/ with nvcc; without the headers both say so and end. `--dry-run` runs every measurement in tiny shapes on the
CPU; there nvfp4 and fp8 products fail, as ONNX Runtime has them on CUDA only, and linear.py runs the parts that need no
GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SECTIONS = {
    "machine": 30,
    "graphs": 60,
    "decode": 150,
    "linear": 60,
    "operators": 120,
    "lora": 40,
    "groups": 60,
    "backend": 100,
    "calibrate": 120,
    "cpp": 120,
    "training": 90,
    "encoding": 90,
    "rival": 90,
}
"""Section → most seconds it may start measurements in, the first section first."""
TRIES = 4


def unexpected(directory: Path) -> list[str]:
    """Return the rows of a dry run that failed and should not have: the CPU has no packed product for nvfp4 and fp8."""
    lines = [line for path in sorted(directory.glob("*.jsonl")) for line in path.read_text().splitlines()]
    rows = [row for row in map(json.loads, lines) if "error" in row]
    return [f"{row['key']}: {row['error']}" for row in rows if "MatMulBlockQuantized" not in row["error"]]


def main() -> None:
    """Run the sections within the time limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0, help="of all sections together")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which, in which order")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the seconds of every section")
    parser.add_argument("--graphs", default="graphs", help="directories that coatrt_parts.py wrote, by commas")
    parser.add_argument("--headers", default="", help="directory of ONNX Runtime's headers, for linear and cpp")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    end = time.time() + given.seconds
    hold = given.out / "go"
    names = given.sections.split(",")
    if "rival" in names:
        hold.unlink(missing_ok=True)

    def command(name: str, seconds: float) -> list[str]:
        options = {"graphs": ["--graphs", given.graphs], "rival": ["--hold", str(hold)]}
        if given.headers:
            options["linear"] = ["--headers", given.headers]
            options["cpp"] = ["--headers", str(Path(given.headers).parent)]
        more = options.get(name, [])
        dry = ["--dry-run"] if given.dry_run else []
        start = [sys.executable, str(HERE / f"{name}.py"), "--out", str(given.out), "--seconds", f"{seconds:.0f}"]
        return [*start, *dry, *more]

    rival: subprocess.Popen[bytes] | None = None
    for name in names:
        if name == "rival" and rival is not None:
            hold.touch()
            try:
                rival.wait(max(1.0, end - time.time()))
            except subprocess.TimeoutExpired:
                rival.kill()
            continue
        if (
            name == "graphs" and "rival" in names
        ):  # torch.compile needs the CPU for a minute; this section times nothing
            with (given.out / "rival.log").open("wb") as log:
                rival = subprocess.Popen(command("rival", given.seconds), stdout=log, stderr=log)
        stop = min(end, time.time() + SECTIONS[name] * given.scale)
        for _ in range(TRIES):
            left = stop - time.time()
            if left < 3 and not given.dry_run:
                break
            began = time.time()
            with (given.out / f"{name}.log").open("ab") as log:
                try:
                    code = subprocess.run(command(name, left), stdout=log, stderr=log, timeout=left + 45).returncode
                except subprocess.TimeoutExpired:
                    code = 0
            print(f"{name}: status {code} after {time.time() - began:.0f} s", flush=True)
            if code == 0:
                break
    if rival is not None and rival.poll() is None:
        rival.kill()
    if given.dry_run and (wrong := unexpected(given.out)):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
