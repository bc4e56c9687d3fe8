"""`coatrt serve`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coatrt.cli.common import runtime_options, trust_options
from coatrt.cli.help import documented

if TYPE_CHECKING:
    from coatrt.bundle import SignaturePolicy

__all__ = ["command"]


@documented(
    examples=(
        "coatrt serve bundles/l4",
        "coatrt serve small=bundles/t4 large=bundles/l4 --port 8080 --batch 16",
        "COATRT_API_KEY=secret coatrt serve bundles/l4 --host 0.0.0.0",
    ),
    first=("host", "port", "api_key", "batch", "context", "threads", "queue", "time_limit", "grace"),
)
@click.argument("bundles", nargs=-1, required=True, metavar="[NAME=]BUNDLE...")
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all.")
@click.option("-p", "--port", type=int, default=8000, help="TCP port; 0 for a free one.")
@click.option(
    "--api-key",
    envvar="COATRT_API_KEY",
    show_envvar=True,
    help="Key that clients must send; better given in the environment, as others can see a command line.",
)
@click.option("--batch", type=int, default=8, help="Sequences of each bundle that are computed at once.")
@click.option("--queue", type=int, default=64, help="Requests that may wait; more are refused with 503.")
@click.option("--time-limit", type=float, default=600.0, help="Seconds that a request may take.")
@click.option("--grace", type=float, default=5.0, help="Seconds that running requests get after SIGTERM.")
@click.option(
    "-t",
    "--threads",
    type=int,
    help="Threads of one step (ort); as many steps run at once as cores allow. Above 1, an answer can differ in "
    "rounding with what else runs.  [default: 1]",
)
@trust_options
@runtime_options("backend", "context", "accuracy_level")
def command(
    bundles: tuple[str, ...],
    host: str,
    port: int,
    api_key: str | None,
    queue: int,
    time_limit: float,
    grace: float,
    key: Path | None,
    signature: "SignaturePolicy | None",
    **runtime: Any,
) -> None:
    """Serve bundles over HTTP with OpenAI's protocol.

    BUNDLE is a directory that coatrt build or export wrote. Clients call it by its name: NAME, or that of the
    directory; NAME:base runs it without its LoRA.
    """
    from coatrt.system.extras import require

    require("coatrt serve", "serve", "cpu")
    from coatrt.bundle import Bundle
    from coatrt.engines.runtime.options import RuntimeOptions
    from coatrt.engines.serving.options import ServeOptions
    from coatrt.engines.serving.server import serve
    from coatrt.errors import ConfigError

    options = ServeOptions(RuntimeOptions(**runtime), api_key, queue, time_limit, grace)
    opened: dict[str, Bundle] = {}
    for text in bundles:
        name, equals, path = text.partition("=")
        if not equals or Path(text).is_dir():
            name, path = Path(text).resolve().name, text
        if name in opened:
            raise ConfigError(f"two bundles are called {name}; give one another name: other={path}")
        opened[name] = Bundle.open(path, key=key, policy=signature)
    serve(opened, options, host=host, port=port, listening=lambda url: click.echo(f"listening on {url}", err=True))
