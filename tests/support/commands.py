"""Runs coatrt's commands on tiny inputs, in forks of a process that has imported everything once."""

import atexit
import gc
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.kills import fork
from support.tiny import save_tiny_llama

__all__ = ["Inputs", "content", "import_everything", "run_command"]

FORMATS = "nf3-g32,int8"


def import_everything() -> None:
    """Import everything that commands need and shorten timings, so that each fork of this process starts at once."""
    import importlib

    settings = tempfile.mkdtemp()  # for matplotlib; readable by other users, as some tests change the user
    Path(settings).chmod(0o755)
    atexit.register(shutil.rmtree, settings, ignore_errors=True)
    os.environ["MPLCONFIGDIR"] = settings

    import onnxruntime
    import torch
    import transformers

    for name in ("train", "search", "plan", "export", "build", "adapt", "verify", "run", "bench", "report", "devices"):
        importlib.import_module(f"coatrt.cli.{name}")
    for name in (
        "coatrt.training.run",
        "coatrt.searching.run",
        "coatrt.engines.bundles.execute",
        "coatrt.engines.bundles.adapt",
        "coatrt.engines.measure.bench",
        "coatrt.reporting.write",
        "matplotlib.backends.backend_agg",
        "matplotlib.backends.backend_svg",
        "matplotlib.patheffects",
        "transformers.models.llama.modeling_llama",
        "transformers.tokenization_utils_tokenizers",
        "transformers.models.auto.modeling_auto",
    ):
        importlib.import_module(name)
    from coatrt.engines.measure import cpu_timings

    cpu_timings._BUDGET, cpu_timings._WORKING_SET = 0.0, 1 << 16
    assert cpu_timings.time_cpu.__kwdefaults__ is not None
    cpu_timings.time_cpu.__kwdefaults__["contexts"] = (16, 32)
    gc.freeze()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    onnxruntime.set_default_logger_severity(4)


def run_command(
    arguments: Sequence[object],
    prepare: Callable[[], object] = lambda: None,
    *,
    output: Path | None = None,
    errors: Path | None = None,
    started: Callable[[int], object] | None = None,
) -> int:
    """Run a command in a fork of this process and return its exit code; negative if a signal ended it.

    Args:
        arguments: arguments of coatrt.
        prepare: called in the child before the command.
        output: file for standard output; None discards it.
        errors: file for standard error; None for the same as `output`.
        started: called with the child's process id.
    """

    from coatrt.cli.main import main  # imported before the fork, as a signal may reach the child at once

    def work() -> None:
        for number, path in ((1, output or os.devnull), (2, errors)):
            if path is not None:
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        if errors is None:
            os.dup2(1, 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=False)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
        sys.argv = ["coatrt", *map(str, arguments)]
        prepare()
        main()

    return fork(work, started)


class Inputs:
    """A tiny model, a text, an adapter, a configuration and a bundle in a folder.

    Args:
        folder: the folder; missing inputs are created there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.text = folder / "model", folder / "text.txt"
        self.adapter, self.config, self.bundle = folder / "adapter", folder / "config.json", folder / "bundle"
        if not self.bundle.exists():
            folder.mkdir(parents=True, exist_ok=True)
            assert fork(self._make) == 0
            log = folder / "log"
            for arguments in (
                self.train(self.adapter),
                ["build", self.adapter, "--target", "cpu", "-o", self.bundle, "--context", 64],
            ):
                assert run_command(arguments, output=log) == 0, log.read_text()
            plan = self.adapter / ".." / "config.json"
            assert run_command(["plan", self.adapter, "--target", "cpu", "-o", plan], output=log) == 0, log.read_text()
            log.unlink()
            for path in folder.rglob("*"):  # readable by other users, as some tests change the user
                path.chmod(0o755 if path.is_dir() else 0o644)

    def _make(self) -> None:
        save_tiny_llama(self.model, num_hidden_layers=1)
        words = ("cat", "dog", "hen", "owl", "fox", "bee")
        self.text.write_text("\n\n".join(f"{word} the {word} sat on the mat. " * 30 for word in words))

    def train(self, output: Path) -> list[object]:
        """Return the command that trains the adapter into `output`."""
        return [
            *("train", self.model, "--data", self.text, "-o", output, "--steps", 3, "--checkpoint-every", 1),
            *("--formats", FORMATS, "--batch", 2, "--max-length", 32, "--calibration", 20, "--evaluation", 2),
            *("--rank", 16, "--budgets", 5, "--quantizer", "feedback"),
        ]


def content(directory: Path) -> dict[str, Any]:
    """Return the files of a command's output by name, without times and engines."""
    files: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.suffix == ".engine" or not path.is_file():
            continue
        files[name] = path.read_bytes()
        if path.name in ("adapter.json", "metrics.json", "manifest.json"):
            value = json.loads(files[name])
            for key in ("seconds", "sha256", "engines", "fingerprint", "seal"):  # the fingerprint hashes source files
                value.pop(key, None)
            for file in [file for file in value.get("files", ()) if file.endswith(".engine")]:
                del value["files"][file]
            files[name] = value
    return files
