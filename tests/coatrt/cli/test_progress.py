"""What progress looks like: lines every half minute in a log, a bar for each stage in a terminal."""

import ast
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep

import pytest

from coatrt.cli import progress
from coatrt.cli.progress import drawn_progress
from coatrt.system.progress import Progress

pytestmark = pytest.mark.fast


class Clock:
    """A clock that only the test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def showing(what: str, stream: io.StringIO) -> Iterator[Progress]:
    with redirect_stderr(stream), drawn_progress(what) as show:
        yield show


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the thread from drawing: the test does, by its clock."""
    monkeypatch.setattr(progress, "_BEAT_SECONDS", 3600.0)


def test_a_log_gets_a_line_every_half_minute(clock: Clock, still: None) -> None:
    with showing("train", log := io.StringIO()) as show:
        for step in range(1, 101):
            clock.now += 1
            show(step, 100, "training", f"loss {step / 10}")
    assert log.getvalue().splitlines() == [
        "train: training 28/100, loss 2.8 (28 s)",
        "train: training 56/100, loss 5.6 (56 s)",
        "train: training 84/100, loss 8.4 (84 s)",
    ]


def test_a_log_gets_lines_while_the_work_reports_nothing(clock: Clock, still: None) -> None:
    printed, seen = [clock.now], 0
    with showing("verify", log := io.StringIO()) as show:
        assert isinstance(show, progress._Drawing)
        for second in range(300):
            clock.now += 1
            if second == 100:
                show(0, 1, "loading the model")
            if second == 200:
                show(3, 7, "weights")
            show._beat()
            if len(log.getvalue()) > seen:
                seen = len(log.getvalue())
                printed.append(clock.now)
    lines = log.getvalue().splitlines()
    assert max(after - before for before, after in pairwise([*printed, clock.now])) <= 30
    assert lines[0] == "verify: starting (28 s)"
    assert lines[4] == "verify: loading the model (140 s)"
    assert lines[-1] == "verify: weights 3/7 (280 s)"


def test_lines_come_from_a_thread_while_the_work_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_BEAT_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.02)
    with showing("build", log := io.StringIO()):
        end = monotonic() + 20
        while log.getvalue().count("\n") < 3 and monotonic() < end:
            sleep(0.01)
    assert log.getvalue().splitlines()[:2] == ["build: starting (0 s)"] * 2
    ended = log.getvalue()
    sleep(0.1)
    assert log.getvalue() == ended


def test_short_work_leaves_a_log_empty(clock: Clock, still: None) -> None:
    with showing("plan", log := io.StringIO()) as show:
        for step in range(1, 28):
            clock.now += 1
            show(step, 30, "devices")
    assert log.getvalue() == ""


def test_a_line_without_a_note_ends_with_the_seconds(clock: Clock, still: None) -> None:
    with showing("search", log := io.StringIO()) as show:
        show(0, 7, "loading")
        clock.now += 31
        show(2, 7, "measuring")
        clock.now += 27
        show(3, 7, "measuring")
    assert log.getvalue() == "search: measuring 2/7 (31 s)\n"


def test_a_stream_that_cannot_be_written_stops_no_work(clock: Clock, still: None) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("no space left on device")

    with showing("train", Full()) as show:
        clock.now += 60
        show(1, 2, "training")


def test_the_clock_of_a_bar_goes_on_while_the_work_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_BAR_DELAY", 0.05)
    monkeypatch.setattr(progress, "_BEAT_SECONDS", 0.02)
    with showing("verify", terminal := Terminal()) as show:
        show(0, 1, "loading the model")
        end = monotonic() + 20
        while terminal.getvalue().count("loading the model") < 3 and monotonic() < end:
            sleep(0.01)
    assert terminal.getvalue().count("verify: loading the model [00:00]") >= 3
    assert terminal.getvalue().endswith("\n")


def test_a_line_stands_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_BAR_DELAY", 0.0)
    monkeypatch.setattr(progress, "_BEAT_SECONDS", 3600.0)
    with showing("build", terminal := Terminal()) as show:
        show(1, 2, "writing")
        progress.write_line("l4: built", terminal)
    assert "\rl4: built\n" in terminal.getvalue()


def test_a_terminal_gets_a_bar_for_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_BAR_DELAY", 0.0)
    with showing("train", terminal := Terminal()) as show:
        show(1, 2, "calibration")
        show(2, 2, "calibration")
        show(10, 50, "training", "loss 3.5")  # a resumed training does not begin at zero
        show(50, 50, "training", "loss 1.25")
    text = terminal.getvalue()
    assert "train: calibration: 100%" in text
    assert "train: training: 100%" in text and "50/50" in text and "loss 1.25" in text
    assert text.index("calibration: 100%") < text.index("training: 100%")
    assert text.endswith("\n")  # what is printed next has a line of its own


def test_a_terminal_without_columns_gets_lines(monkeypatch: pytest.MonkeyPatch, clock: Clock, still: None) -> None:
    class Narrow(Terminal):
        def fileno(self) -> int:
            return 2

    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((0, 0)))
    with showing("train", narrow := Narrow()) as show:
        clock.now += 30
        show(1, 2, "training")
    assert narrow.getvalue() == "train: training 1/2 (30 s)\n"


def test_a_bar_that_was_never_shown_leaves_nothing() -> None:
    with showing("plan", terminal := Terminal()) as show:
        show(1, 2, "devices")
        show(2, 2, "devices")
    assert terminal.getvalue().strip() == ""


def test_a_bar_is_closed_where_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_BAR_DELAY", 0.0)
    terminal = Terminal()
    with pytest.raises(RuntimeError), showing("train", terminal) as show:
        show(1, 2, "training")
        raise RuntimeError
    assert terminal.getvalue().endswith("\n")


def test_without_standard_error_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with drawn_progress("train") as progress:
        progress(1, 2, "steps")


@pytest.mark.parametrize(
    "name", ["train", "search", "plan", "export", "build", "verify", "bench", "report", "calibrate"]
)
def test_every_long_command_draws_its_progress(name: str) -> None:
    text = Path(progress.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    drawn = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.With)
        and any(ast.unparse(item.context_expr) == f"drawn_progress({name!r})" for item in node.items)
    ]
    # verify measures quality, too; export writes bundles, or checkpoints
    assert len(drawn) == (2 if name in ("verify", "export") else 1)
