"""Plans as text: one or two in full, more as a table, repeated parts once."""

from collections.abc import Sequence

from coatrt.planning.limits import EVERYTHING_FITS
from coatrt.planning.plan import Plan
from coatrt.system.text_table import aligned

__all__ = ["fleet_table", "plans_text"]

_LEAST_LOSS = 5e-5  # smaller ones would be shown as +0.0000
_LIMITS = ("--bits 4.5", "a smaller --memory", "--objective latency")


def plans_text(plans: Sequence[Plan]) -> str:
    """Return one or two plans in full, more as a table, and a hint where everything fits."""
    parts = [fleet_table(plans)] if len(plans) > 2 else _in_full(plans)
    hint = _hint(plans)
    return "\n\n".join([*parts, *([hint] if hint else [])])


def _in_full(plans: Sequence[Plan]) -> list[str]:
    """Return each plan as lines; of a plan with an earlier one's configuration only the lines that differ."""
    parts: list[str] = []
    first: dict[str, Plan] = {}
    for plan in plans:
        same = first.setdefault(plan.config.hash, plan)
        if same is plan:
            parts.append(plan.text())
            continue
        known = set(same.text().splitlines())
        lines = [line for line in plan.text().splitlines() if line not in known]
        parts.append("\n".join([f"{same.device}, {plan.device}: the same configuration", *lines]))
    return parts


def fleet_table(plans: Sequence[Plan], *, sources: bool = True) -> str:
    """Return a line per plan, then a line per configuration, then, with `sources`, those of the predictions.

    Devices whose lines are equal share one, devices with equal configurations too.
    """
    rows: dict[tuple[str, ...], list[str]] = {}
    by_configuration: dict[str, list[Plan]] = {}
    for plan in plans:
        limit = f" of {plan.limit_bytes / 2**20:.0f}" if plan.limit_bytes else ""
        cells = (
            plan.config.hash,
            f"{plan.average_bits:.2f}",
            f"{plan.total_bytes / 2**20:.0f}{limit}",
            _loss(plan.predicted_loss_increase),
            f"{plan.tokens_per_second:.0f}" if plan.tokens_per_second else "?",
            plan.binds,
        )
        rows.setdefault(cells, []).append(plan.device)
        by_configuration.setdefault(plan.config.hash, []).append(plan)
    head = ("device", "configuration", "bits", "MiB", "loss", "tokens/s", "binds")
    table = aligned([head, *((", ".join(devices), *cells) for cells, devices in rows.items())], "<<>>>><")
    formats = []
    for name, group in by_configuration.items():
        counts = ", ".join(f"{count} × {text}" for text, count in group[0].config.counts.items())
        same = "the same configuration, " if len(group) > 1 else ""
        formats.append(f"{name}  {', '.join(plan.device for plan in group)}: {same}{counts}")
    origins = dict.fromkeys(plan.latency_source for plan in plans if sources and plan.latency_source)
    return "\n".join([table, "", *formats, "", *(f"predicted by {origin}" for origin in origins)]).rstrip()


def _loss(increase: float) -> str:
    return "<0.0001" if 0 < increase < _LEAST_LOSS else f"+{increase:.4f}"


def _hint(plans: Sequence[Plan]) -> str | None:
    """Return on which devices no limit decides, and which limits to try, in one line; None if there are none."""
    fitting = [plan for plan in plans if plan.binds == EVERYTHING_FITS]
    if not fitting:
        return None
    steps = next((plan.next_steps for plan in fitting if plan.next_steps), _LIMITS)
    options = ", ".join(step.partition(" would change ")[0] for step in steps)
    devices = ", ".join(plan.device for plan in fitting)
    return f"everything fits on {devices}: no limit decides; for a smaller or faster model try {options}"
