"""metrics.jsonl has neither gaps nor doubles, whatever was on disk before."""

import errno
import io
import json
import sys

import pytest
from rich.table import Table

from pgps_jax.report.run_log import Appended, RunLog, Spoken, complain, read_records, say


def test_records_come_back_as_they_were_written(tmp_path):
    log = RunLog(tmp_path)
    log.record("step", 0, loss=0.5)
    log.record("epoch", 0, pseudo_dice=[None, 0.25])
    log.close()
    assert read_records(tmp_path / "metrics.jsonl") == [
        {"kind": "step", "step": 0, "loss": 0.5}, {"kind": "epoch", "step": 0, "pseudo_dice": [None, 0.25]}]


def test_a_resumed_log_forgets_the_steps_that_its_checkpoint_does_not_know(tmp_path):
    log = RunLog(tmp_path)
    for step in range(10):
        log.record("step", step)
    log.close()
    log = RunLog(tmp_path, first_step=6)
    for step in range(6, 12):
        log.record("step", step)
    log.close()
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == list(range(12))


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"kind": "step", "step": 0}) + "\n" + '{"kind": "step", "st')
    assert read_records(path) == [{"kind": "step", "step": 0}]


def test_what_is_said_is_also_in_the_text_log(tmp_path):
    log = RunLog(tmp_path)
    log.say("stage 3 [begins]")
    log.close()
    assert "stage 3 [begins]" in (tmp_path / "train.log").read_text()


def test_what_cannot_be_written_for_a_while_waits_and_comes_complete(tmp_path):
    folder, away = tmp_path / "run", tmp_path / "away"
    folder.mkdir()
    log = RunLog(folder)
    log.record("step", 0)
    assert log.flush() is None
    folder.rename(away)
    log.record("step", 1)
    log.say("warning: something")
    assert isinstance(log.flush(), OSError)
    away.rename(folder)
    log.record("step", 2)
    assert log.flush() is None
    log.close()
    assert [r["step"] for r in read_records(folder / "metrics.jsonl")] == [0, 1, 2]
    assert (folder / "train.log").read_text().count("something") == 1
    assert [e["text"] for e in read_records(folder / "events.jsonl")] == ["something"]


def test_a_line_of_which_a_full_disk_took_only_a_part_is_written_again_whole(tmp_path):
    lines = Appended(tmp_path / "x.jsonl")
    lines.add('{"a": 1}')
    lines.write()
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write('{"a": ')
    lines.add('{"a": 2}')
    lines.write()
    later = Appended(tmp_path / "x.jsonl")  # another session, after a kill in the middle of a line
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write('{"a"')
    later.add('{"a": 3}')
    later.write()
    assert read_records(tmp_path / "x.jsonl") == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_events_are_kept_when_the_run_goes_back(tmp_path):
    log = RunLog(tmp_path)
    log.event("start", step=0)
    log.record("step", 0)
    log.rewind(0)
    log.close()
    assert [e["kind"] for e in RunLog(tmp_path).events] == ["start"]
    assert read_records(tmp_path / "metrics.jsonl") == []


def test_lines_that_were_damaged_are_left_out_when_a_run_goes_on(tmp_path):
    good = {"kind": "step", "step": 0, "loss": 1.0}
    odd = [json.dumps(value) for value in ({"kind": "step", "step": "0"}, {"step": 1}, {"kind": 7, "step": 0}, {"kind": "step"}, [good])]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*odd, "[" * 10**5, '{"kind": "st', json.dumps(good)]) + "\n")
    log = RunLog(tmp_path, first_step=5)
    assert log.records == [good] and log.of_kind("step") == [good]


def test_what_was_said_before_there_was_a_log_is_logged_without_being_said_again(tmp_path, capsys):
    spoken = Spoken()
    spoken.say("batch 12 needs 3 GiB")
    spoken.say("warning: slow disk")
    log = RunLog(tmp_path)
    for line in spoken.lines:
        log.note(line)
    log.close()
    assert capsys.readouterr().out.count("batch 12") == 1
    assert "batch 12 needs 3 GiB" in (tmp_path / "train.log").read_text()
    assert [e["text"] for e in log.events] == ["slow disk"]


def test_a_table_is_in_the_text_log_as_text(tmp_path, capsys):
    log, table = RunLog(tmp_path), Table("stage", "steps", title="efficiency")
    table.add_row("0", "1,575")
    log.show(table)
    log.close()
    for text in (capsys.readouterr().out, (tmp_path / "train.log").read_text()):
        assert "efficiency" in text and "1,575" in text and "\x1b" not in text


class Gone(io.StringIO):
    """A stream whose reader has gone away."""

    def __init__(self, number):
        super().__init__()
        self._number = number

    def flush(self):
        raise OSError(self._number, "nobody reads this")


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_terminal_that_has_closed_or_a_pipe_that_broke_stops_nothing(tmp_path, monkeypatch, number):
    monkeypatch.setattr(sys, "stdout", Gone(number))
    monkeypatch.setattr(sys, "stderr", Gone(number))
    log = RunLog(tmp_path)
    log.say("still here")
    say("still here")
    complain("still here")
    log.close()
    assert "still here" in (tmp_path / "train.log").read_text()
