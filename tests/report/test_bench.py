"""What limits training is told from rates that anybody can check."""

import io

import numpy as np
import pytest
from rich.console import Console

from pgps_jax.curriculum import Schedule, Stage
from pgps_jax.report.bench import Host, StageBench, advice, bench_table, limit_of, overall_limit

STAGES = tuple(Stage(i, (8 * i + 8,) * 3, 2) for i in range(4))
SMALL = Host(cores=8, threads=2, processes=0, cache_bytes=10**8, stored_bytes=10**9, case_bytes=3 * 10**9, free_bytes=10**11,
             larger_crops=True)
HUGE = SMALL._replace(stored_bytes=10**12, case_bytes=3 * 10**12)


def row(stage=0, **rates):
    usual = dict(cold=50.0, input=100.0, step=20.0, both=19.0, input_wait=0.01, busy=0.9, disk_reads=0.0)
    return StageBench(STAGES[stage], **usual | rates)


@pytest.mark.parametrize("host, rates, limit", [
    (SMALL, {}, "compute-bound"),
    (SMALL, {"cold": 5.0}, "compute-bound"),  # only until every file has been read once
    (HUGE, {"cold": 5.0}, "disk-bound"),  # again and again
    (HUGE, {"cold": None}, "compute-bound"),
    (SMALL, {"input": 10.0, "both": 9.0, "input_wait": 0.5}, "input-bound"),
    (SMALL, {"input": 10.0, "both": 9.0, "input_wait": 0.5, "busy": 0.1, "disk_reads": 40.0}, "disk-bound"),
    (SMALL, {"input": 10.0, "both": 9.0, "input_wait": 0.5, "busy": 0.1, "disk_reads": 0.1}, "input-bound"),  # hardly for the disk
    (SMALL, {"input": 10.0, "both": 9.0, "input_wait": 0.5, "busy": None, "disk_reads": 40.0}, "input-bound"),
])  # fmt: skip
def test_the_limit_follows_from_the_rates(host, rates, limit):
    assert limit_of(row(**rates), host) == limit


def test_the_whole_schedule_is_judged_by_the_time_that_its_stages_take():
    schedule = Schedule(STAGES, np.repeat(np.arange(4, dtype=np.int32), 100), np.ones(400, np.int32))
    slow_input = row(0, both=10.0, input_wait=0.8)  # stands for stages 0 and 1 as well: 20 s, of which 16 s are waiting
    quick = row(3, both=100.0, input_wait=0.0)  # 2 s
    limit, waiting = overall_limit([slow_input, quick], schedule, SMALL)
    assert limit == "input-bound" and waiting == pytest.approx(16 / 22)
    limit, waiting = overall_limit([slow_input, quick._replace(both=1.0)], schedule, SMALL)
    assert limit == "compute-bound" and waiting == pytest.approx(16 / 220)


def test_advice_names_flags_that_can_help_here():
    assert "--threads 8" in advice("input-bound", SMALL) and "--cache-gb 3.3" in advice("input-bound", SMALL)
    assert "--augment.preset light" in advice("input-bound", SMALL)
    full = SMALL._replace(threads=8, cache_bytes=10**11, larger_crops=False)
    assert "--" not in advice("input-bound", full) and "cores" in advice("input-bound", full)
    assert "--cache-gb" not in advice("disk-bound", HUGE) and "local disk" in advice("disk-bound", HUGE)


def test_the_table_fits_a_terminal():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(bench_table([row(), row(3, cold=None, input=1234.5, step=0.123)], SMALL))
    text = console.export_text()
    assert "1,234" in text and "0.12" in text and "32x32x32 batch 2" in text and "compute" in text
