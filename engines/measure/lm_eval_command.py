"""The command `lm_eval`, with bundles as one more kind of model."""

import importlib
import sys
from collections.abc import Sequence

from coatrt.errors import CoatError, ConfigError, reason
from coatrt.system.extras import require

__all__ = ["run_lm_eval"]

_MODEL = "coatrt.engines.measure.lm_eval_model:BundleLM"


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Run lm-eval's command with the model "coatrt" beside its own.

    lm-eval after 0.4.13 finds this model by its entry point, and `lm_eval --model coatrt` does the same.

    Args:
        arguments: of `lm_eval`.

    Raises:
        ExtraError: lm-eval or ONNX Runtime is missing.
        CoatError: the bundle or an argument of the model is wrong.
        ConfigError: lm-eval refuses an argument, a task or its data.
        SystemExit: lm-eval ends the program, such as after its help.
    """
    require("coatrt lm-eval", "eval", "cpu")
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    importlib.import_module("lm_eval.models")  # lm-eval registers its own models only while there are none
    if "coatrt" not in model_registry:
        model_registry.register("coatrt", target=_MODEL)
    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        cli_evaluate()
    except CoatError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"lm-eval stops: {reason(error)}; see lm_eval run --help") from None
    finally:
        sys.argv = before
