"""Proves what progress prints where stderr is no terminal: plain lines, not too many, and none when not wanted."""

import io
import re

import pytest

from unet_fast import progress
from unet_fast.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_lines_come_every_ten_seconds_with_the_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 100) as bar:
        for i in range(100):
            clock.now += 1
            bar.advance(f"loss {i}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train 10/100  loss 9  10 s, 90 s left"
    assert lines[4] == "train 50/100  loss 49  50 s, 50 s left"
    # the tenth at the end, and the word that it is done
    assert lines[-2:] == ["train 100/100  loss 99  100 s", "train 100/100  done  100 s"]
    assert len(lines) == 11


def test_what_was_done_before_does_not_count_for_the_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("train", 100, done=90) as bar:
        clock.now += 20
        bar.advance("x", by=5)
        assert capsys.readouterr().err == "train 95/100  x  20 s, 20 s left\n"


def test_nothing_is_said_where_nothing_is_wanted(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 2, shown=False) as bar:
        clock.now += 60
        bar.advance("x")
    assert capsys.readouterr() == ("", "")


def test_an_error_is_not_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with Progress("predict", 3) as bar:
            bar.advance()
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert capsys.readouterr() == ("", "")


def test_nothing_to_do_is_no_division_by_zero(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 5, done=5):
        pass
    with Progress("predict", 0):
        pass
    assert capsys.readouterr().err == "train 5/5  done  0 s\npredict 0/0  done  0 s\n"


def test_stdout_stays_empty_and_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen, out = Terminal(), io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("sys.stdout", out)
    with Progress("train", 3) as bar:
        for _ in range(3):
            bar.advance("loss 0.3")
    assert out.getvalue() == ""
    assert re.search(r"train.*3/3.*loss 0\.3", screen.getvalue(), re.DOTALL)
