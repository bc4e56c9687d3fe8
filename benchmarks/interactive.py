"""Waiting times of a user: --help, the hypernetwork, and the bundle of a second configuration.

python benchmarks/interactive.py   (needs out/demo/adapter: make demo)
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import random_config, save_result, smollm2

from coatrt.adapter.adapter import Adapter
from coatrt.devices.profiles import device_profile
from coatrt.engines.bundles.execute import execute
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.prepare import prepare
from coatrt.engines.bundles.targets import Target
from coatrt.engines.measure.bench import percentiles
from coatrt.engines.runtime.emitter import Emitter
from coatrt.planning import planner


def main() -> None:
    """Measure all three and check the limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path, default=Path("out/demo/adapter"))
    options = parser.parse_args()
    program = Path(sys.executable).parent / "coatrt"
    helps = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([program, "--help"], check=True, capture_output=True)
        helps.append(time.perf_counter() - start)
    adapter, checkpoint = Adapter.from_pretrained(options.adapter), smollm2()
    adapter.checkpoint(checkpoint.directory)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        # The first bundle fills the cache of encoded matrices; the second has another budget and another GPU.
        for name, bits in (("rtx-3060", 4.5), ("rtx-3090", 5.5), ("rtx-4090", 6.0), ("rtx-5090", 5.0)):
            profile = device_profile(name)
            start = time.monotonic()
            plan = planner.plan(adapter.description, profile, bits=bits)
            target = Target(profile, plan.config, Path(scratch) / name, plan)
            preparation = prepare(adapter.description, [target], BundleOptions())
            bundle = execute(preparation, adapter, checkpoint)[0].bundle
            rows.append(
                {
                    "device": name,
                    "bits": bits,
                    "seconds": time.monotonic() - start,
                    "build_s": bundle.manifest["engines"][0]["seconds"],
                }
            )
            print(rows[-1], flush=True)
        emitter, rng, seconds = Emitter.of(bundle), np.random.default_rng(0), []
        for _ in range(50):
            config = random_config(adapter.description.space, rng)
            start = time.perf_counter()
            emitter.emit(config)
            seconds.append(time.perf_counter() - start)
    emission = percentiles(seconds[5:])
    result = {
        "help_median_s": statistics.median(helps),
        "emission": {
            **emission,
            "tensors": len(adapter.description.contract.shapes),
            "rank": adapter.description.contract.rank,
        },
        "bundles": rows,
    }
    save_result("interactive", "python benchmarks/interactive.py", result)
    slow = [row for row in rows[1:] if row["seconds"] > 30]
    if slow or emission["p50_ms"] > 50 or statistics.median(helps) > 0.3:
        sys.exit(f"over a limit: {slow} {emission} {helps}")


if __name__ == "__main__":
    main()
