"""metrics.jsonl has neither gaps nor doubles, whatever was on disk before."""

import json

from pgps_jax.report.run_log import RunLog, read_records


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
