"""Progress is told on a terminal by a bar and elsewhere, now and then, by a line."""

import pytest

from pgps_jax.report import progress
from pgps_jax.report.progress import CaseProgress, duration
from pgps_jax.report.run_log import console


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_without_a_terminal_a_line_a_minute_tells_what_is_done_and_how_long_the_rest_will_take(clock, capsys):
    with CaseProgress("preprocessing") as tell:
        for done in range(20):
            tell(done, 20)
            clock.now += 25
    printed = capsys.readouterr()
    assert printed.out == "", "what is printed may be JSON for a program"
    assert printed.err.splitlines() == [
        "preprocessing: 3 of 20, 7.1 min left", "preprocessing: 6 of 20, 5.8 min left", "preprocessing: 9 of 20, 4.6 min left",
        "preprocessing: 12 of 20, 3.3 min left", "preprocessing: 15 of 20, 2.1 min left", "preprocessing: 18 of 20, 50 s left"]


def test_the_pace_is_that_of_this_session_and_those_who_know_better_are_asked(clock, capsys):
    with CaseProgress("training") as tell:
        tell(1000, 1010, "stage 1")
        clock.now += 100
        tell(1001, 1010, "stage 1")
        clock.now += 100
        tell(1002, 1010, "stage 2", lambda: 7200.0)
    assert capsys.readouterr().err.splitlines() == [
        "training: 1001 of 1010, 15 min left  (stage 1)", "training: 1002 of 1010, 2.0 h left  (stage 2)"]


def test_what_is_done_within_a_minute_and_what_is_seen_on_a_terminal_makes_no_lines(clock, capsys, monkeypatch):
    with CaseProgress("planning") as tell:
        tell(1, 2)
        clock.now += 59
        tell(2, 2)
    monkeypatch.setattr(console, "_force_terminal", True)
    with CaseProgress("planning") as tell:
        clock.now += 1000
        tell(2, 2)
    assert capsys.readouterr().err == ""


WORDS = [(5, "5 s"), (600, "10 min"), (7200, "2.0 h"), (90 * 3600, "3.8 days"), (float("nan"), "an unknown time")]


@pytest.mark.parametrize("seconds, text", WORDS)
def test_durations_are_said_as_people_do(seconds, text):
    assert duration(float(seconds)) == text
