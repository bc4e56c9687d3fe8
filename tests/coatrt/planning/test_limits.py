"""What a plan says of its limits, on candidates written down by hand."""

import numpy as np
import pytest

from coatrt.devices.profiles import device_profile
from coatrt.planning.limits import EVERYTHING_FITS, Limit, Measures, binding, limits_of
from coatrt.planning.plan import PlanRequest

MIB = 2**20
BITS = np.array([3.25, 4.0, 4.4, 6.0, 8.0])
MEASURES = Measures(
    total=np.rint(BITS * 100) * MIB,
    seconds=BITS / 1000,
    loss=np.array([0.2, 0.08, 0.04, 0.01, 0.001]),
    bits=BITS,
    timed=True,
)


def test_where_everything_fits_tighter_limits_are_named_with_what_they_change() -> None:
    limits = limits_of(PlanRequest(), device_profile("rtx-4090"), MEASURES)
    name, steps = binding("quality", limits, 4, MEASURES)
    assert name == EVERYTHING_FITS == "everything fits"
    change = "predicted loss by +0.0390, memory by -360.00 MiB, time per token by -45%"  # from 8 to 4.4 bits
    assert steps == (
        f"--bits 4.5 or --memory 440MiB would change {change}",  # one bit above 3.25, rounded up to half a bit
        f"--objective latency would change {change}",  # the fastest of a loss of at most 0.05
    )


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"bits": np.array([7.5, 7.6, 7.7, 7.8, 8.0])}, "--bits 7.75 or --memory 440MiB would"),  # half of the way
        ({"total": np.full(5, 500.0 * MIB)}, "--bits 4.5 would"),
        ({"timed": False}, "--bits 4.5 or --memory 440MiB would"),
    ],
)
def test_only_limits_that_would_decide_are_named(changes: dict[str, object], first: str) -> None:
    measures = Measures(**{**vars(MEASURES), **changes})  # type: ignore[arg-type]
    _, steps = binding("quality", [], 4, measures)
    assert steps[0].startswith(first)
    assert len(steps) == (2 if measures.timed else 1)
    assert ("time per token" in steps[0]) == measures.timed


def test_one_candidate_has_nothing_to_try() -> None:
    one = Measures(**{name: part[:1] if name != "timed" else part for name, part in vars(MEASURES).items()})
    assert binding("quality", [], 0, one) == (EVERYTHING_FITS, ())


def test_a_change_of_time_is_told_from_noise() -> None:
    limit = Limit("bits", 6.0, BITS)
    for seconds, said in ((0.006 * 1.0099, "time per token within noise"), (0.006 * 1.0101, "time per token by +1%")):
        measures = Measures(**{**vars(MEASURES), "seconds": np.array([0.001, 0.002, 0.003, 0.006, seconds])})
        name, (step,) = binding("quality", [limit], 3, measures)
        assert name == "--bits 6" and step.startswith("--bits 8 would change predicted loss by -0.0090")
        assert step.endswith(said)
