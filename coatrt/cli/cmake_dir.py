"""`coatrt cmake-dir`."""

import click

from coatrt.cli.help import documented

__all__ = ["command"]


@documented(
    examples=(
        "coatrt cmake-dir",
        "coatrt cmake-dir --onnxruntime",
    )
)
@click.option("--onnxruntime", is_flag=True, help="Print the path of the installed libonnxruntime instead.")
def command(onnxruntime: bool) -> None:
    """Print the directory of the C++ library's CMake package.

    A CMake project finds the library with -Dcoatrt_DIR=$(coatrt cmake-dir).
    """
    from importlib.util import find_spec
    from pathlib import Path

    from coatrt.errors import BuildError
    from coatrt.system.extras import require

    if onnxruntime:
        require("coatrt cmake-dir --onnxruntime", "cpu")
    name = "onnxruntime" if onnxruntime else "coatrt.engines"
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise BuildError(f"the package {name} is not installed; run pip install . in a checkout of coatrt")
    root = Path(spec.origin).parent
    paths = sorted(root.glob("capi/libonnxruntime.so.*" if onnxruntime else "cpp/coatrt-config.cmake"))
    if not paths:
        missing = "libonnxruntime" if onnxruntime else "C++ library"
        raise BuildError(f"no {missing} in {root}; run pip install . in a checkout of coatrt")
    click.echo(paths[0] if onnxruntime else paths[0].parent)
