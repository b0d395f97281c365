"""The summary of a run tells what happened over all its sessions, and says what went wrong in words."""

from pgps_jax.report.health_summary import health_lines, health_summary


def step(number, stage=0, seconds=1.0, wait=0.25):
    return {"kind": "step", "step": number, "stage": stage, "seconds": seconds, "input_wait": wait}


RECORDS = [
    {"kind": "stage", "step": 0, "stall_seconds": 2.0}, step(0), step(1),
    {"kind": "epoch", "step": 1, "validation_seconds": 3.0, "host_peak_bytes": 2**30},
    {"kind": "stage", "step": 2, "stall_seconds": 1.0}, step(2, stage=1, seconds=4.0), step(3, stage=1, seconds=6.0),
]


def test_seconds_are_summed_by_what_they_were_for():
    summary = health_summary(RECORDS, [{"kind": "start"}])
    assert (summary["seconds_of_steps"], summary["seconds_of_validation"], summary["seconds_waiting_for_programs"]) == (12.0, 3.0, 3.0)
    assert summary["input_wait_share"] == round(1.0 / 12, 4)
    stages = [(s["stage"], s["steps"], s["seconds"], s["seconds_per_step"]) for s in summary["stages"]]
    assert stages == [(0, 2, 2.0, 1.0), (1, 2, 10.0, 5.0)]


def test_a_run_without_trouble_is_told_in_two_lines():
    lines = health_lines(health_summary(RECORDS, [{"kind": "start"}], 3 * 2**30))
    assert len(lines) == 2 and "never resumed" in lines[0] and "3.00 GiB" in lines[0] and "0: 2, 1: 10" in lines[1]


def test_every_kind_of_trouble_has_its_line():
    events = [{"kind": "start"}, {"kind": "warning", "text": "disk full"}, {"kind": "warning", "text": "disk full"},
              {"kind": "stall", "text": "waiting"}, *[{"kind": "skipped", "step": 7, "cases": ["a"]}] * 2,
              {"kind": "halved", "stage": 1, "batch_size": 2}, {"kind": "stopped", "step": 3}, {"kind": "start"}, {"kind": "start"}]
    summary = health_summary(RECORDS, events)
    assert (summary["resumes"], summary["stops"], summary["warnings"], summary["input_stalls"]) == (2, 1, 2, 1)
    assert summary["skipped_steps"] == [7] and summary["halved_batches"] == [{"stage": 1, "batch_size": 2}]
    text = "\n".join(health_lines(summary))
    for words in ("2 times resumed", "once", "steps 7", "stage 1 went on with batches of 2", "disk full"):
        assert words in text, words


def test_nothing_done_is_nothing_told_wrongly():
    summary = health_summary([], [])
    assert summary["steps"] == 0 and summary["input_wait_share"] == 0 and health_lines(summary)
