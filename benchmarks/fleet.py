"""A fleet: eight devices planned, three bundles built side by side and again, engine bytes and memory as predicted.

python benchmarks/fleet.py   (needs out/demo/adapter: make demo)
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import save_result, smollm2
from markdown_tables import load

from coatrt.adapter.adapter import Adapter
from coatrt.adapter.description import AdapterDescription
from coatrt.bundle import Bundle
from coatrt.configs.space import ConfigSpace
from coatrt.devices.profiles import device_profile
from coatrt.engines.builders.builder import build_engine
from coatrt.engines.builders.builder_slots import BuilderSlots
from coatrt.engines.builders.engine_cache import EngineCache
from coatrt.engines.bundles.execute import execute
from coatrt.engines.bundles.options import BundleOptions
from coatrt.engines.bundles.prepare import prepare
from coatrt.engines.bundles.targets import Target
from coatrt.engines.runtime.options import RuntimeOptions
from coatrt.engines.runtime.switch import SwitchingDecoder
from coatrt.export.decoder import GraphForm, export_decoder
from coatrt.planning import planner
from coatrt.planning.memory import Workload, memory_of
from coatrt.planning.plan import PlanRequest

FLEET = ("rtx-3050-laptop", "rtx-4050-laptop", "t4", "rtx-3060", "rtx-4090", "rtx-5090", "h100", "rtx-pro-6000")
THREE = {"rtx-3060": 4.5, "rtx-4090": 6.0, "rtx-5090": 5.0}
ENGINES = ("rtx-3060", "rtx-4090", "rtx-5090", "t4")


def planning(adapter: Path) -> dict[str, Any]:
    """Time the command for eight devices, process start included, and the function alone."""
    command = [str(Path(sys.executable).parent / "coatrt"), "plan", str(adapter), "--json", "--bits", "5"]
    for name in FLEET:
        command += ["--target", name]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        process = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
    facts, profiles = AdapterDescription.load(adapter), [device_profile(name) for name in FLEET]
    start = time.perf_counter()
    plans = planner.plan_fleet(facts, profiles, PlanRequest(bits=5))
    alone = time.perf_counter() - start
    same = [row["configuration_hash"] for row in json.loads(process.stdout)] == [plan.config.hash for plan in plans]
    return {
        "devices": [{"id": p.id, "memory_bytes": p.memory_bytes} for p in profiles],
        "command_s": seconds,
        "command_median_s": statistics.median(seconds),
        "function_s": alone,
        "same_hashes": same,
    }


def building(adapter: Adapter, checkpoint: Any, scratch: Path) -> tuple[dict[str, Any], dict[str, Bundle]]:
    """Time three bundles with one builder at a time, side by side, and again through the command."""
    result: dict[str, Any] = {}
    codes = adapter.codes(checkpoint)
    plans = {name: planner.plan(adapter.description, device_profile(name), bits=bits) for name, bits in THREE.items()}
    for plan in plans.values():  # encoded once, before the clock starts
        for name, fmt in plan.config.formats.items():
            codes.get(name, fmt)
    for label, jobs in (("one_at_a_time_s", 1), ("side_by_side_s", 2)):
        place = scratch / label
        targets = [Target(device_profile(name), plan.config, place / name, plan) for name, plan in plans.items()]
        cache = EngineCache(scratch / f"cache-{label}")
        start = time.perf_counter()
        preparation = prepare(adapter.description, targets, BundleOptions())
        results = execute(preparation, adapter, checkpoint, cache=cache, slots=BuilderSlots(jobs))
        result[label] = time.perf_counter() - start
    start = time.perf_counter()
    again = execute(prepare(adapter.description, targets, BundleOptions()), adapter, checkpoint)
    result["again_function_s"] = time.perf_counter() - start
    result["again_states"] = [row.state for row in again]
    return result, {row.target.device.id: row.bundle for row in results}


def second_command(adapter: Path, scratch: Path) -> dict[str, Any]:
    """Time `coatrt build` for three devices with nothing left to do, process start included."""
    command = [
        str(Path(sys.executable).parent / "coatrt"),
        "build",
        str(adapter),
        "-o",
        str(scratch / "cli"),
        "--bits",
        "5",
        "--no-engine",
    ]
    for name in THREE:
        command += ["--target", name]
    subprocess.run(command, check=True, capture_output=True)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        process = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert process.stdout.count("up to date") == 3
    return {"second_build_s": seconds, "second_build_median_s": statistics.median(seconds)}


def engine_bytes(
    adapter: Adapter, checkpoint: Any, scratch: Path, built: list[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """Compare ten configurations that the size model was not fitted to, built now or in an earlier run."""
    rows, codes, rng, model = [], adapter.codes(checkpoint), np.random.default_rng(11), adapter.description.model
    for number in range(10):
        profile = device_profile(ENGINES[number % len(ENGINES)])
        space = ConfigSpace(model, tuple(fmt for fmt in adapter.description.formats if profile.supports(fmt)))
        bits = float(rng.uniform(max(3.6, space.min_bits), min(7.5, space.max_bits)))
        config = space.sample(rng, bits)
        if built is not None:
            size = built[number]["engine_bytes"]
        else:
            directory, form = scratch / f"engine{number}", GraphForm("engine", "base.onnx", "float16", 2048)
            directory.mkdir()
            contract = adapter.description.contract
            export_decoder(checkpoint, config, directory, forms=[form], contract=contract, codes=codes)
            size = build_engine(directory / "base.onnx", directory / "e.engine", profile).bytes
        lines = memory_of(config, model, profile, Workload.of(adapter.description, 2048, 1, 512))
        predicted = sum(lines[name] for name in ("weights", "scales", "other tensors", "engine"))
        rows.append(
            {
                "device": profile.id,
                "bits": config.average_bits(model),
                "engine_bytes": size,
                "predicted_bytes": predicted,
                "error": predicted / size - 1,
            }
        )
        print(rows[-1], flush=True)
    return rows


_PEAK = """
import json, sys
from coatrt.bundle import Bundle
from coatrt.engines.runtime.lora_file import load_lora
from coatrt.engines.runtime.load import load_decoder
from coatrt.engines.runtime.options import RuntimeOptions
bundle = Bundle.open(sys.argv[1])
def line(name):  # not ru_maxrss, which begins with the parent's
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0])
before = line("VmRSS")
decoder = load_decoder(bundle, RuntimeOptions(context=2048, accuracy_level=int(sys.argv[2])))
decoder.set_lora(load_lora(bundle.path("lora.safetensors"), bundle.contract))
decoder.prefill([[1 + i % 100 for i in range(512)]])
decoder.decode([5])
print(json.dumps([before, line("VmHWM"), line("VmRSS")]))
"""


def cpu_memory(adapter: Adapter, bundles: dict[str, Bundle]) -> list[dict[str, Any]]:
    """Compare the predicted memory of the CPU with ONNX Runtime's peak in a separate process."""
    rows = []
    for name, bundle in bundles.items():
        lines = memory_of(
            bundle.config,
            adapter.description.model,
            device_profile("cpu"),
            Workload.of(adapter.description, 2048, 1, 512, 4),
        )
        command = [sys.executable, "-c", _PEAK, str(bundle.directory), "4"]
        process = subprocess.run(command, check=True, capture_output=True, text=True)
        before, peak, resident = (kib << 10 for kib in json.loads(process.stdout))
        rows.append(
            {
                "bundle": name,
                "predicted_bytes": sum(lines.values()),
                "peak_bytes": peak,
                "resident_bytes": resident,
                "imports_bytes": before,
                "lines": dict(lines),
            }
        )
        print(rows[-1], flush=True)
    return rows


def switching(bundles: dict[str, Bundle]) -> list[dict[str, Any]]:
    """Time switches between configurations of a running session, with one decoder in memory and with all."""
    rows = []
    for held in (1, len(bundles)):
        session = SwitchingDecoder(bundles, options=RuntimeOptions(context=2048), cache_size=held)
        session.prefill([[1 + i % 100 for i in range(128)]])
        for _ in range(2):
            for name in bundles:
                row = session.switch(name)
                session.decode([5])
                rows.append(
                    {
                        "held": held,
                        "to": name,
                        "load_s": row.load_seconds,
                        "emit_s": row.emit_seconds,
                        "bind_s": row.bind_seconds,
                        "kept": row.continues,
                    }
                )
        del session
        gc.collect()
    return rows


def main() -> None:
    """Measure everything and check the limits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, default=Path("out/demo/adapter"))
    parser.add_argument(
        "--again", action="store_true", help="Keep the bytes of the ten engines; measure everything else again."
    )
    options = parser.parse_args()
    adapter, checkpoint = Adapter.from_pretrained(options.adapter), smollm2()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        plans = planning(options.adapter)
        print(plans, flush=True)
        built, bundles = building(adapter, checkpoint, scratch)
        print(built, flush=True)
        built |= second_command(options.adapter, scratch)
        result = {
            "planning": plans,
            "building": built,
            "switching": switching(bundles),
            "cpu_memory": cpu_memory(adapter, bundles),
            "engines": engine_bytes(adapter, checkpoint, scratch, load("fleet")["engines"] if options.again else None),
        }
    save_result("fleet", "python benchmarks/fleet.py", result)
    worst = max(abs(row["error"]) for row in result["engines"])
    if plans["command_median_s"] > 2 or built["second_build_median_s"] > 2 or worst > 0.03:
        sys.exit(
            f"over a limit: plans {plans['command_median_s']:.2f} s, second build "
            f"{built['second_build_median_s']:.2f} s, engine bytes {worst:.3f}"
        )


if __name__ == "__main__":
    main()
