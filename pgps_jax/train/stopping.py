"""Asking a run to stop: Ctrl-C, SIGTERM, SIGUSR1 (SLURM's warning), SIGHUP (the terminal is gone) or a file STOP in the run folder."""

import signal
import threading
from pathlib import Path

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


class StopRequest:
    """Context in which the signals only set a wish; the loop finishes its step, saves and leaves. Ctrl-C twice leaves at once."""

    def __init__(self, folder: Path):
        self._file = folder / "STOP"
        self._file.unlink(missing_ok=True)  # a wish of an earlier session
        self._reason: str | None = None
        self._at_once = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread only; the file still works
        for name in SIGNALS:
            number = getattr(signal, name, None)  # Windows has the first two only
            under_nohup = name == "SIGHUP" and number and signal.getsignal(number) == signal.SIG_IGN
            if number is not None and not under_nohup:
                self._before[number] = signal.signal(number, self._wish)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _wish(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self._reason is not None:
            self._at_once = True
            raise KeyboardInterrupt  # which Python swallows in a callback of the garbage collector: `reason` raises it again
        self._reason = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

    @property
    def reason(self) -> str | None:
        """Who asked to stop, or None. Raises KeyboardInterrupt after a second Ctrl-C."""
        if self._at_once:
            raise KeyboardInterrupt
        if self._reason is None and self._file.exists():
            self._reason = "file STOP"
        return self._reason
