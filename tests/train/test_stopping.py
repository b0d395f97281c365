"""A run stops when asked, in each of the ways that the README names."""

import contextlib
import os
import signal

import pytest

from pgps_jax.train.stopping import StopRequest


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_is_a_wish_and_not_an_interruption(tmp_path, hanging_up_counts, name):
    with StopRequest(tmp_path) as stop:
        assert stop.reason is None
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.reason == ("Ctrl-C" if name == "SIGINT" else name)


def test_ctrl_c_twice_leaves_at_once(tmp_path):
    with StopRequest(tmp_path), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_file_stop_is_a_wish_for_this_session_only(tmp_path):
    with StopRequest(tmp_path) as stop:
        (tmp_path / "STOP").touch()
        assert stop.reason == "file STOP"
    with StopRequest(tmp_path) as stop:
        assert stop.reason is None


def test_a_run_under_nohup_does_not_stop_when_its_terminal_closes(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(tmp_path) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.reason is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(tmp_path):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_ctrl_c_that_python_swallows_is_noticed_at_the_next_step(tmp_path):
    with StopRequest(tmp_path) as stop:
        signal.raise_signal(signal.SIGINT)
        with contextlib.suppress(KeyboardInterrupt):  # as in a callback of the garbage collector
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            _ = stop.reason
