"""`coatrt cmake-dir`."""

import click

__all__ = ["command"]


@click.command()
@click.option("--onnxruntime", is_flag=True, help="Print the path of the installed libonnxruntime instead.")
def command(onnxruntime: bool) -> None:
    """Print the directory of the C++ library's CMake package, for -Dcoatrt_DIR."""
    from importlib.util import find_spec
    from pathlib import Path

    from coatrt.errors import BuildError
    from coatrt.system.extras import require

    if onnxruntime:
        require("coatrt cmake-dir --onnxruntime", "cpu")
    name = "onnxruntime" if onnxruntime else "coatrt.engines"
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise BuildError(f"the package {name} is not installed; install coatrt again")
    root = Path(spec.origin).parent
    found = sorted(root.glob("capi/libonnxruntime.so.*" if onnxruntime else "cpp/coatrt-config.cmake"))
    if not found:
        lacking = "libonnxruntime; install onnxruntime" if onnxruntime else "C++ library; install coatrt"
        raise BuildError(f"{root} holds no {lacking} again")
    click.echo(found[0] if onnxruntime else found[0].parent)
