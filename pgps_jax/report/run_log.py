"""What a run leaves to read: metrics.jsonl and events.jsonl for programs, train.log and the console for people.

metrics.jsonl holds what training did: every line is one JSON object with `kind` (step, epoch, stage, ...) and `step`. A
resumed run first drops the records that its checkpoint does not know, so that the file has neither gaps nor doubles.
events.jsonl holds what happened to the run (starts, warnings, rollbacks, stops); nothing is ever dropped from it.

A file that cannot be written for a while, because a disk is full or a network folder gone, costs nothing: what was to
be written waits in memory.
"""

import errno
import io
import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table

SECONDS_BETWEEN_WRITES = 2.0  # of step records, for those who watch a run
LOG_COLUMNS = 160  # of tables in train.log, and wherever there is no terminal


class Output(io.TextIOBase):
    """Standard output, as long as there is somebody to read it: a closed terminal or a broken pipe stops no training."""

    @property
    def _stream(self) -> io.TextIOBase:
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # rich stands in its place while a bar is shown

    @property
    def encoding(self) -> str | None:
        """Of the stream behind it."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """Whether a terminal is behind it."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Of the stream behind it."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write, or forget what nobody would read."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush; what cannot be written now is said to nobody, and nothing is from then on when the reader is gone."""
        try:
            self._stream.flush()
        except OSError as error:
            with suppress(OSError):  # a stream without a file
                if error.errno in (errno.EPIPE, errno.EIO):  # Python would try it again at its end, and fail
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


console = Console(file=Output(), highlight=False, soft_wrap=True)
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = LOG_COLUMNS  # a file or a pipe has no width of its own, and 80 columns cut the tables


def read_records(path: Path) -> list[dict]:
    """Complete records of a .jsonl file; a last line cut short by a kill is left out, and so is what is no record."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


class Appended:
    """Lines on their way to the end of a file; they wait while it cannot be written.

    The file is opened for every write: a folder that was away and came back is found again.
    """

    def __init__(self, path: Path):
        self._path = path
        self._waiting: list[bytes] = []
        self._lock = threading.Lock()  # watchdogs speak from threads of their own
        self._complete: int | None = None  # bytes of the file up to its last complete line, once something was written

    def add(self, line: str) -> None:
        """Take a line; `write` brings it to the file."""
        with self._lock:
            self._waiting.append(line.encode() + b"\n")

    def write(self, sync: bool = False) -> OSError | None:
        """Append what waits, with `sync` down to the disk; returns what prevented it, and keeps the lines then."""
        with self._lock:
            try:
                with self._path.open("ab") as file:
                    complete = _end_of_last_line(self._path) if self._complete is None else min(self._complete, file.tell())
                    file.truncate(complete)  # behind it lies what a kill or a failed write left of a line
                    text = b"".join(self._waiting)
                    file.write(text)
                    file.flush()
                    if sync:
                        os.fsync(file.fileno())
            except OSError as error:
                return error
            self._complete = complete + len(text)
            self._waiting.clear()
        return None


def _end_of_last_line(path: Path) -> int:
    """Bytes of a file up to the end of its last complete line."""
    with path.open("rb") as file:
        return file.read().rfind(b"\n") + 1


class RunLog:
    """Appends to metrics.jsonl, events.jsonl and train.log of one run folder; keeps the records for plots and averages."""

    def __init__(self, folder: Path, first_step: int = 0):
        self._path = folder / "metrics.jsonl"
        self._text, self._events = Appended(folder / "train.log"), Appended(folder / "events.jsonl")
        self.events = read_records(folder / "events.jsonl")
        self._begin(read_records(self._path), first_step)

    def _begin(self, records: list[dict], first_step: int) -> None:
        known = [r for r in records if isinstance(r.get("kind"), str) and isinstance(r.get("step"), int)]  # others were damaged
        self.records = [r for r in known if r["step"] < first_step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        os.replace(temporary, self._path)
        self._metrics, self._written_at = Appended(self._path), time.monotonic()

    def rewind(self, first_step: int) -> None:
        """Forget the records of `first_step` and later: the run goes back to a checkpoint."""
        self._begin(self.records, first_step)

    def record(self, kind: str, step: int, **values) -> dict:
        """Append one record; `step` is the index of the step that it is about."""
        entry = {"kind": kind, "step": step, **values}
        self.records.append(entry)
        self._metrics.add(json.dumps(entry))
        if time.monotonic() - self._written_at > SECONDS_BETWEEN_WRITES:
            self._metrics.write()
            self._written_at = time.monotonic()
        return entry

    def event(self, kind: str, **values) -> dict:
        """Append one event, with the time."""
        entry = {"kind": kind, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **values}
        self.events.append(entry)
        self._events.add(json.dumps(entry))
        self._events.write()
        return entry

    def say(self, text: str) -> None:
        """One line for people, on the console and with the time in train.log; a warning is an event too."""
        console.print(text, markup=False)
        self.note(text)

    def note(self, text: str) -> None:
        """One line for train.log alone, as it has been said already; a warning is an event too."""
        self._text.add(time.strftime("%Y-%m-%d %H:%M:%S  ") + text)
        self._text.write()
        if text.startswith("warning: "):
            self.event("warning", text=text.removeprefix("warning: "))

    def show(self, table: Table) -> None:
        """A table for people, on the console and in train.log."""
        console.print(table)
        plain = Console(file=io.StringIO(), width=LOG_COLUMNS)
        plain.print(table)
        self._text.add(plain.file.getvalue().rstrip("\n"))
        self._text.write()

    def stalled(self, text: str) -> None:
        """Say that reading stands still, which is an event too."""
        self.say(text)
        self.event("stall", text=text)

    def of_kind(self, kind: str) -> list[dict]:
        """Records of one kind, oldest first."""
        return [r for r in self.records if r["kind"] == kind]

    def flush(self) -> OSError | None:
        """Bring what was recorded to disk, before a checkpoint that counts on it; returns what prevented it."""
        self._written_at = time.monotonic()
        self._events.write()
        return self._metrics.write(sync=True)

    def close(self) -> None:
        """Write what waits."""
        self.flush()
        self._text.write()


def say(text: str) -> None:
    """One line for people where there is no run to log it to."""
    console.print(text, markup=False)


class Spoken:
    """Says lines where there is no run to log them to yet, and keeps them for its log."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """One line for people."""
        say(text)
        self.lines.append(text)


def complain(text: str) -> None:
    """One line on the error stream, if somebody reads it."""
    with suppress(OSError):
        print(text, file=sys.stderr)
