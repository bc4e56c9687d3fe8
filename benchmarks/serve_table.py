"""The table of docs/guides/serve.md: streams of the server together."""

from collections.abc import Callable

from markdown_tables import grid, load

__all__ = ["SERVE_TABLES"]


def serve() -> str:
    """Decode throughput by streams, and what eight clients got."""
    found = load("serve")
    rates, ratio, clients = found["tokens_per_second"], found["eight_streams_to_one"], found["load"]
    rows = [["tokens/s together", *(f"{rate:.1f}" for rate in rates.values())]]
    model, cores = found["bundle"]["model"].partition(".")[0], found["environment"]["cores"]
    differ = f"{clients['tokens_that_differ']} of {clients['tokens']:,} tokens different from those of one client alone"
    text = (
        f"`{found['command']}`: {model} on {cores} cores; eight streams were "
        f"{ratio['median']:.2f} × as fast as one (median of rounds, least {ratio['least']:.2f}). Then "
        f"{clients['clients']} clients for {clients['seconds']:.0f} s: {clients['requests']} requests, "
        f"{clients['errors']} errors, {differ}."
    )
    return f"{grid(['streams', *rates], rows)}\n\n{text}"


SERVE_TABLES: dict[str, Callable[[], str]] = {"serve": serve}
