"""Plans for a person: what repeats is told once, what everything fits on says what to try."""

from dataclasses import replace
from pathlib import Path

import pytest

from coatrt.adapter.description import AdapterDescription
from coatrt.devices.profiles import device_profile
from coatrt.planning import planner
from coatrt.planning.plan import Plan, PlanRequest
from coatrt.planning.plans_text import fleet_table, plans_text


@pytest.fixture(scope="module")
def adapter(tiny_adapter: Path) -> AdapterDescription:
    return AdapterDescription.load(tiny_adapter)


def fleet(adapter: AdapterDescription, *names: str, **limits: float) -> list[Plan]:
    return planner.plan_fleet(adapter, [device_profile(name) for name in names], PlanRequest(**limits))  # type: ignore[arg-type]


def test_a_fleet_without_limits_gets_one_configuration_told_once_and_a_hint(adapter: AdapterDescription) -> None:
    plans = fleet(adapter, "rtx-3060", "rtx-4090", "rtx-5090")
    text = plans_text(plans)
    lines = text.splitlines()
    assert text.count("15 × int8") == 1
    assert f"{plans[0].config.hash}  rtx-3060, rtx-4090, rtx-5090: the same configuration, 15 × int8" in lines
    (hint,) = [line for line in lines if line.startswith("everything fits")]
    assert hint == lines[-1]
    assert hint.startswith("everything fits on rtx-3060, rtx-4090, rtx-5090: no limit decides; ")
    assert hint.endswith("try --bits 4.5")  # a model so small has no use for less memory
    assert len(lines[0].split("  ")) >= 7 and len(lines[0].split()) == 7


def test_what_the_hint_says_to_try_binds_and_changes_what_it_says(adapter: AdapterDescription) -> None:
    (free,) = fleet(adapter, "rtx-4060")
    (step,) = free.next_steps
    assert step.startswith("--bits 4.5 would change predicted loss by +")
    (tight,) = fleet(adapter, "rtx-4060", bits=4.5)
    assert tight.binds == "--bits 4.5" and tight.average_bits < free.average_bits
    loss = tight.predicted_loss_increase - free.predicted_loss_increase
    assert f"predicted loss by {loss:+.4f}, " in step
    assert f"memory by {(tight.total_bytes - free.total_bytes) / 2**20:+.2f} MiB" in step
    assert free.decode_seconds and tight.decode_seconds
    assert f"time per token by {tight.decode_seconds / free.decode_seconds - 1:+.0%}" in step


def test_limits_that_bind_leave_no_hint(adapter: AdapterDescription) -> None:
    plans = fleet(adapter, "t4", "l4", "rtx-4090", bits=5)
    text = plans_text(plans)
    assert "everything fits" not in text
    assert text.count(plans[1].config.hash) == 3  # two rows, one line of formats
    assert f"{plans[0].config.hash}  t4: " in text
    assert "l4, rtx-4090: the same configuration, " in text


def test_two_plans_of_one_configuration_share_its_lines(adapter: AdapterDescription) -> None:
    first, second = fleet(adapter, "rtx-4060", "l4", bits=5)
    assert first.config == second.config
    alone, both = first.text().splitlines(), plans_text([first, second]).splitlines()
    assert both[: len(alone)] == alone
    rest = both[len(alone) + 1 :]
    assert rest[0] == "rtx-4060, l4: the same configuration"
    assert set(rest[1:]) == set(second.text().splitlines()) - set(alone)
    assert not any(line.startswith(("configuration", "predicted loss", "weights")) for line in rest)
    other = fleet(adapter, "t4", "l4", bits=5)
    assert plans_text(other) == "\n\n".join(plan.text() for plan in other)


def test_equal_rows_are_one_and_tiny_losses_are_not_zero(adapter: AdapterDescription) -> None:
    (plan,) = fleet(adapter, "rtx-4060", bits=5)
    twin = replace(plan, device="twin")
    rows = fleet_table([plan, twin, replace(plan, device="odd", predicted_loss_increase=1e-5)]).splitlines()
    assert rows[1].startswith("rtx-4060, twin  ")
    assert rows[2].split()[:1] == ["odd"] and "<0.0001" in rows[2]
    assert rows[3] == ""


def test_a_change_of_time_below_a_hundredth_is_noise(adapter: AdapterDescription) -> None:
    (plan,) = fleet(adapter, "l4", memory=fleet(adapter, "l4")[0].total_bytes - 20_000)
    assert plan.decode_seconds
    (step,) = plan.next_steps
    faster = fleet(adapter, "l4")[0].decode_seconds
    assert faster and abs(faster / plan.decode_seconds - 1) < 0.01
    assert step.endswith("time per token within noise")
