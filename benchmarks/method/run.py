"""The evidence, job by job: every (task, arm, seed) is trained and measured and writes a JSON file; a rerun resumes.

python benchmarks/method/run.py --task sotu   hours on a CPU; results appear one by one
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, Arm, LoraBank
from aware import AwareLora, UpstreamNoise, noisy_moments
from setting import BATCH, BUDGETS, FORMATS, PARTS, Measured, Setting

from coatrt.adapter.compensation import Compensator
from coatrt.adapter.lora import CoaLora
from coatrt.configs.config import QuantConfig
from coatrt.configs.lora_contract import contract_for
from coatrt.devices.environment import environment
from coatrt.evaluation.losses import measure_held_out
from coatrt.system.distributed import Processes
from coatrt.system.json_data import write_json
from coatrt.training.loop import optimise
from coatrt.training.options import TrainOptions

RESULTS = Path(__file__).parents[1] / "results" / "method"
STEPS = 120
LIMIT = {"sotu": 24, "trec": 500}  # held-out blocks, held-out questions


def options_of(arm: Arm, setting: Setting, steps: int, seed: int) -> TrainOptions:
    """Return the loop's options of an arm."""
    return TrainOptions(
        formats=FORMATS,
        rank=arm.rank,
        alpha=2.0 * arm.rank,
        preset=arm.preset,
        compensation=arm.compensated,
        steps=steps,
        batch=BATCH[setting.task] * arm.examples,
        accumulate=PARTS[setting.task],
        learning_rate=arm.rate,
        rate_ratio=arm.rate_ratio,
        theta_rate=1e-3,
        checkpoint_every=50,
        seed=seed,
    )


def module(setting: Setting, arm: Arm, seed: int) -> Any:
    """Return the LoRA module of an arm."""
    contract = contract_for(setting.checkpoint.matrices, arm.rank, 2.0 * arm.rank)
    if arm.kind == "bank":
        return LoraBank(contract, setting.encoder, seed).to(setting.compute)
    lora = CoaLora(contract, setting.encoder, arm.preset, seed).to(setting.compute)
    if arm.compensated:
        lora.compensate(
            Compensator(setting.base, setting.moments, contract),
            setting.gains if arm.start_share else None,
            arm.start_share,
        )
    if not arm.aware:
        return lora.to(setting.compute)
    places = {matrix.name: (matrix.layer, matrix.kind) for matrix in setting.checkpoint.matrices.targets}
    reference = setting.pool[0]
    most = 1.0 if arm.aware == "noise" else 1.5  # what was measured at 1 is not extrapolated
    noise = UpstreamNoise(places, setting.sensitivity.costs, reference, most)
    if arm.aware != "noise":
        return AwareLora(lora, arm.aware, noise)
    moments = noisy_moments(setting.base, setting.moments, reference)
    return AwareLora(lora, arm.aware, noise, (setting.base, setting.moments.leader, moments))


@torch.no_grad()
def measure(setting: Setting, lora: Any, entries: list[Measured]) -> list[dict[str, Any]]:
    """Return held-out losses of configurations with a LoRA; None: without."""
    rows, model = [], setting.base
    pairs = lora.pairs(entries[0].config).values() if lora is not None else ()
    count = sum(a.numel() + b.numel() for a, b in pairs)
    for entry in entries:
        model.set_config(entry.config)
        model.set_pairs(lora.pairs(entry.config) if lora is not None else None)
        bits = entry.config.average_bits(setting.checkpoint.matrices)
        rows.append(
            {
                "budget": entry.budget,
                "kind": entry.kind,
                "seen": entry.is_trained,
                "configuration": entry.config.hash,
                "bits": bits,
                "bits_with_lora": bits + setting.lora_bits(count),
                **measure_held_out(model, setting.data, LIMIT[setting.task]),
            }
        )
    return rows


def train(setting: Setting, arm: Arm, seed: int, steps: int, job: str, only: QuantConfig | None = None) -> Any:
    """Train the module of an arm, on one configuration or on the pool; return it and its history."""
    options = options_of(arm, setting, steps, seed)
    lora = module(setting, arm, seed)

    def draw(step: int) -> list[QuantConfig]:
        return [only] if only is not None else setting.draw(step, seed, arm.draws)

    state = setting.scratch / job
    run = json.dumps([asdict(options), asdict(arm), setting.data.digest, only.hash if only is not None else ""])
    history = optimise(setting.base, lora, setting.data.train, draw, options, state, run, Processes())
    return lora, history


def job_name(setting: Setting, arm: str, seed: int, budget: float = 0.0) -> str:
    """Return the name of a training; budget 0 if it serves all budgets."""
    return "-".join([setting.model, setting.task, arm, *([str(budget)] if budget else []), str(seed)])


def job_result(setting: Setting, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Run one job."""
    arm, start = ARMS[name], time.monotonic()
    facts: dict[str, Any] = {"model": setting.model, "task": setting.task, "arm": name, "seed": seed}
    entries, rows, seconds, passes, parameters = list(setting.measured), [], 0.0, 0, 0
    if arm.kind == "none":
        rows = measure(setting, None, entries)
        setting.base.set_config(None)
        setting.base.set_pairs(None)
        facts["full_precision"] = measure_held_out(setting.base, setting.data, LIMIT[setting.task])
    elif arm.kind == "single":
        steps = round(steps * arm.share)
        for entry in [entry for entry in entries if entry.is_trained and entry.kind == "planned"]:
            job = job_name(setting, name, seed, entry.budget)
            lora, history = train(setting, arm, seed, steps, job, entry.config)
            rows += measure(setting, lora, [entry])
            print(f"{job:<40} {rows[-1]['loss']:.3f}", flush=True)
            seconds, passes = seconds + history.seconds, passes + steps
            parameters += sum(p.numel() for _, p in lora.named_parameters())
    else:
        lora, history = train(setting, arm, seed, steps, job_name(setting, name, seed))
        rows = measure(setting, lora, entries)
        seconds, passes, steps = history.seconds, 2 * steps, history.step
        parameters = sum(p.numel() for _, p in lora.named_parameters())
    return {
        **facts,
        "what": arm.what,
        "steps": steps,
        "passes": passes,
        "trained_parameters": parameters,
        "compute": setting.compute,
        "training_s": seconds,
        "wall_s": time.monotonic() - start,
        "rows": rows,
        "environment": environment(),
    }


def main() -> None:
    """Run the jobs that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=list(BATCH), default="sotu")
    parser.add_argument("--arms", help="names with commas; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="to distribute the seeds over processes")
    parser.add_argument("--scratch", type=Path, default=Path("out/method"))
    parser.add_argument("--compute", default="cpu", help="torch device of the model")
    parser.add_argument("--learned", type=int, default=0, help="steps that learn scales first")
    arguments = parser.parse_args()
    names = arguments.arms.split(",") if arguments.arms else list(ARMS)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    setting = Setting(arguments.task, arguments.scratch, arguments.compute, learned=arguments.learned)
    for seed in range(arguments.first_seed, arguments.seeds):
        for name in names:
            path = RESULTS / f"{setting.model}-{arguments.task}-{name}-{seed}.json"
            if path.is_file() or (ARMS[name].kind == "none" and seed):
                continue
            result = job_result(setting, name, seed, STEPS)
            write_json(path, result)
            planned = [row for row in result["rows"] if row["kind"] == "planned" and row["seen"]]
            text = " ".join(f"{row['loss']:.3f}" for row in planned)
            print(f"{path.stem:<40} {result['wall_s']:6.0f} s  {text}", flush=True)
    print("budgets", *BUDGETS)


if __name__ == "__main__":
    main()
