"""Make one JSON file of the rows of a GPU check: python benchmarks/gpu/collect.py DIRECTORY [DIRECTORY …].

Of rows with the same key the last one counts. The file is benchmarks/results/gpu/GPU.json, one row per line.
"""

import argparse
import datetime
import json
import math
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu"
COMMAND = "python benchmarks/gpu/check.py --out rows --graphs graphs,smollm2"
_KERNELS = 8  # maximum kernels listed for one step
_NAME = 72  # maximum characters of a kernel's name


def _plain(value: Any) -> Any:
    """Return a value without NaN, which JSON cannot express."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value


def _row(row: dict[str, Any]) -> dict[str, Any]:
    if "top" in row:
        row["top"] = [[name[:_NAME], *numbers] for name, *numbers in row["top"][:_KERNELS]]
    row.pop("took_s", None)
    return _plain(row)  # type: ignore[no-any-return]


def _file_name(gpu: str) -> str:
    """Return h100 of "NVIDIA H100 80GB HBM3", a100 of "NVIDIA A100-SXM4-80GB", the last word of others."""
    name = gpu.lower()
    model = re.search(r"\b[a-z]+\d+[a-z]?\b", name)
    return model[0] if model else name.split()[-1]


def main() -> None:
    """Collect."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--date", default=datetime.datetime.now(tz=datetime.UTC).date().isoformat())
    parser.add_argument("--note", action="append", default=[])
    given = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for directory in given.directories:
        for path in sorted(directory.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                row = _row(json.loads(line))
                rows[row["key"]] = row
    machine = {name: value for name, value in rows.pop("machine/versions").items() if name not in ("key", "took_s")}
    head = {"command": COMMAND, "date": given.date, "machine": machine, "notes": given.note}
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows.values())
    text = json.dumps(head, ensure_ascii=False)[:-1] + f',\n"rows": [\n{lines}\n]}}\n'
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{_file_name(machine['gpu'])}.json"
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {len(rows)} rows, {len(text) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
