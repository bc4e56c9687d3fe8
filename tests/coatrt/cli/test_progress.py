"""What progress looks like: lines every half minute in a log, a bar for each stage in a terminal."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

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


def test_a_log_gets_a_line_every_half_minute(clock: Clock) -> None:
    with showing("train", log := io.StringIO()) as show:
        for step in range(1, 101):
            clock.now += 1
            show(step, 100, "training", f"loss {step / 10}")
    assert log.getvalue().splitlines() == [
        "train: training 30/100, loss 3.0",
        "train: training 60/100, loss 6.0",
        "train: training 90/100, loss 9.0",
    ]


def test_short_work_leaves_a_log_empty(clock: Clock) -> None:
    with showing("plan", log := io.StringIO()) as show:
        for step in range(1, 30):
            clock.now += 1
            show(step, 30, "devices")
    assert log.getvalue() == ""


def test_a_line_without_a_note_ends_with_the_count(clock: Clock) -> None:
    with showing("search", log := io.StringIO()) as show:
        show(0, 7, "loading")
        clock.now += 31
        show(2, 7, "measuring")
        clock.now += 29
        show(3, 7, "measuring")
    assert log.getvalue() == "search: measuring 2/7\n"


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
