"""What a LoRA made for one configuration is worth under another: LoRA per configuration, and what θ emits.

python benchmarks/method/cross.py   after `run.py --model smollm2 --task sotu --seeds 1 --arms single,same-theta`, from
the training states they left; it goes on where it was stopped.
"""

import json
import sys
from pathlib import Path
from typing import Any

from arms import ARMS
from run import LIMIT, STEPS, job_name, train
from setting import BUDGETS, Setting

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import RESULTS, save_result

from coatrt.evaluation.losses import measure_held_out

MODEL, TASK = "smollm2", "sotu"


def main() -> None:
    """Measure every planned configuration that was trained on under the LoRAs made for each of them."""
    setting = Setting(MODEL, TASK, Path("out/method"))
    planned = {entry.budget: entry.config for entry in setting.measured if entry.seen and entry.kind == "planned"}
    path = RESULTS / "cross.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    for arm in ("single", "same-theta"):
        for made_for, config in planned.items():
            if sum(row["arm"] == arm and row["made_for"] == made_for for row in rows) == len(planned):
                continue
            rows = [row for row in rows if (row["arm"], row["made_for"]) != (arm, made_for)]
            only, budget = (config, made_for) if arm == "single" else (None, 0.0)
            lora, _ = train(setting, ARMS[arm], 0, STEPS[MODEL], job_name(setting, arm, 0, budget), only)
            setting.base.set_pairs({name: (a.detach(), b.detach()) for name, (a, b) in lora.pairs(config).items()})
            for under, other in planned.items():
                setting.base.set_config(other)
                loss = measure_held_out(setting.base, setting.data, LIMIT[MODEL])["loss"]
                rows.append({"arm": arm, "made_for": made_for, "under": under, "loss": loss})
            print(arm, made_for, *(f"{row['loss']:.3f}" for row in rows[-len(planned) :]), flush=True)
            save_result("cross", "python benchmarks/method/cross.py", {"budgets": list(BUDGETS), "rows": rows})


if __name__ == "__main__":
    main()
