"""Plans of many devices as one table of text."""

from collections.abc import Sequence

from coatrt.planning.plan import Plan
from coatrt.system.text_table import aligned

__all__ = ["fleet_table"]


def fleet_table(plans: Sequence[Plan]) -> str:
    """Return one line per plan: configuration, bits, bytes, predicted loss and speed, formats, what binds."""
    rows = [("device", "configuration", "bits", "MiB of", "limit", "loss", "ms/token", "tokens/s", "binds", "formats")]
    for plan in plans:
        decode = plan.decode_seconds
        rows.append(
            (
                plan.device,
                plan.config.hash,
                f"{plan.average_bits:.2f}",
                f"{plan.total_bytes / 2**20:.0f}",
                f"{plan.limit_bytes / 2**20:.0f}" if plan.limit_bytes else "?",
                f"+{plan.predicted_loss_increase:.4f}",
                f"{decode * 1e3:.2f}" if decode else "?",
                f"{1 / decode:.0f}" if decode else "?",
                plan.binds,
                ", ".join(f"{count} {text}" for text, count in plan.config.counts.items()),
            )
        )
    sources = dict.fromkeys(plan.latency_source for plan in plans if plan.latency_source)
    return "\n".join([aligned(rows, "<<>>>>>><<"), "", *(f"predicted by {source}" for source in sources)])
