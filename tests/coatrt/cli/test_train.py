"""What `coatrt train` says at its end."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from coatrt.cli.train import _summary


def test_accuracies_have_their_interval_and_losses_are_perplexities() -> None:
    row = {"bits": 4.0, "without": 4.0, "without_accuracy": 0.25, "adapted": 2.0, "adapted_accuracy": 0.75}
    metrics = {
        "losses": [[1.0, 2.0]],
        "seconds": 61.0,
        "dropped": 0,
        "held_out_tokens": 8,
        "held_out_examples": 8,
        "held_out": {"full_precision": 3.0, "full_precision_accuracy": 0.5, "budgets": [row]},
    }
    adapter: Any = SimpleNamespace(description=SimpleNamespace(metrics=metrics))
    text = _summary(adapter, Path("adapter"), 100.0)
    assert "accuracy over 8 questions, with its 95 % interval" in text
    assert "without LoRA  25 % (7–59 %)   with LoRA 75 % (41–93 %)" in text.replace("LoRA 25", "LoRA  25")
    assert "4.00 bits: without LoRA       54.6   with LoRA     7.39" in text
