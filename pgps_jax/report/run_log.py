"""What a run leaves to read: metrics.jsonl for programs, train.log and the console for people.

Every line of metrics.jsonl is one JSON object with `kind` (step, epoch, stage, ...) and `step`. A resumed run first drops the
records that its checkpoint does not know, so that the file has neither gaps nor doubles.
"""

import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console

console = Console(stderr=False, highlight=False, soft_wrap=True)


def read_records(path: Path) -> list[dict]:
    """Complete records of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


class RunLog:
    """Appends to metrics.jsonl and train.log of one run folder; keeps the records in memory for plots and averages."""

    def __init__(self, folder: Path, first_step: int = 0):
        self._metrics = folder / "metrics.jsonl"
        self._text = (folder / "train.log").open("a")
        self._begin(read_records(self._metrics), first_step)

    def _begin(self, records: list[dict], first_step: int) -> None:
        self.records = [r for r in records if r.get("step", 0) < first_step]
        temporary = self._metrics.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        os.replace(temporary, self._metrics)
        self._jsonl = self._metrics.open("a")

    def rewind(self, first_step: int) -> None:
        """Forget the records of `first_step` and later: the run goes back to a checkpoint."""
        self._jsonl.close()
        self._begin(self.records, first_step)

    def record(self, kind: str, step: int, **values) -> dict:
        """Append one record; `step` is the index of the step that it is about."""
        entry = {"kind": kind, "step": step, **values}
        self.records.append(entry)
        self._jsonl.write(json.dumps(entry) + "\n")
        return entry

    def say(self, text: str) -> None:
        """One line for people, on the console and with the time in train.log."""
        console.print(text, markup=False)
        self._text.write(time.strftime("%Y-%m-%d %H:%M:%S  ") + text + "\n")
        self._text.flush()

    def of_kind(self, kind: str) -> list[dict]:
        """Records of one kind, oldest first."""
        return [r for r in self.records if r["kind"] == kind]

    def flush(self) -> None:
        """Bring what was recorded to disk; call it before a checkpoint that counts on it."""
        self._jsonl.flush()
        os.fsync(self._jsonl.fileno())

    def close(self) -> None:
        """Flush and close both files."""
        self.flush()
        self._jsonl.close()
        self._text.close()


def say(text: str) -> None:
    """One line for people where there is no run to log it to."""
    console.print(text, markup=False)


def complain(text: str) -> None:
    """One line on the error stream."""
    print(text, file=sys.stderr)
