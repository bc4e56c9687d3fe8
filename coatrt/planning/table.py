"""Plans of many devices as one table of text."""

from collections.abc import Sequence

from coatrt.planning.plan import Plan

__all__ = ["fleet_table"]


def fleet_table(plans: Sequence[Plan]) -> str:
    """Return one line per plan: configuration, bits, bytes, predicted loss and speed, formats, what binds."""
    head = ("device", "configuration", "bits", "MiB of", "limit", "loss", "ms/token", "tokens/s", "binds", "formats")
    lines = [head]
    for plan in plans:
        decode = plan.decode_seconds
        lines.append(
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
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    right = {2, 3, 4, 5, 6, 7}
    shown = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    sources = list(dict.fromkeys(plan.latency_source for plan in plans if plan.latency_source))
    return "\n".join([*shown, "", *(f"predicted by {source}" for source in sources)])
