"""The stage table and its picture say what the schedule says."""

import io
import json

import pytest
from rich.console import Console

from pgps_jax.architecture import PatchLimits
from pgps_jax.curriculum import CurriculumConfig, make_schedule
from pgps_jax.data.class_balance import StageBalance
from pgps_jax.report.schedule import plot_schedule, schedule_table, stage_rows, voxel_share

# mean voxels of all steps over those of constant patches, recomputed independently from the two papers' rules
SHARES = [
    ((128, 128, 128), 2, 32, "pgps", 0.381), ((128, 128, 128), 2, 32, "pgps-plus", 0.518),
    ((128, 128, 128), 2, 32, "efficiency", 0.344), ((128, 128, 128), 2, 32, "performance", 0.936),
    ((40, 56, 40), 9, 8, "pgps", 0.350), ((40, 56, 40), 9, 8, "pgps-plus", 0.352),
    ((40, 56, 40), 9, 8, "efficiency", 0.331), ((40, 56, 40), 9, 8, "performance", 0.983),
]


def schedule(patch, batch, increment, mode, num_steps=1000):
    limits = PatchLimits((increment,) * 3, (increment,) * 3)
    return make_schedule(CurriculumConfig(mode=mode), patch, batch, limits, num_steps, 1)


@pytest.mark.parametrize(("patch", "batch", "increment", "mode", "share"), SHARES)
def test_voxel_shares_of_known_plans(patch, batch, increment, mode, share):
    rows = stage_rows(schedule(patch, batch, increment, mode), patch, batch)
    assert voxel_share(rows) == pytest.approx(share, abs=6e-4)


@pytest.mark.parametrize("mode", ["efficiency", "rpss"])
def test_rows_add_up_to_the_schedule(mode):
    ours = schedule((40, 56, 40), 9, 8, mode)
    rows = json.loads(json.dumps(stage_rows(ours, (40, 56, 40), 9, {ours.stages[1]: 5 * 2**20})))
    assert sum(r["steps"] for r in rows) == 1000
    voxels = sum(ours.stage_at(step).voxels for step in range(1000))
    assert voxel_share(rows) == pytest.approx(voxels / (1000 * 9 * 40 * 56 * 40))
    assert [r["memory_bytes"] for r in rows][:3] == [None, 5 * 2**20, None]
    for r in rows:
        assert ours.stage_of_step[r["first_step"]] == r["stage"]
        assert r["stage"] not in ours.stage_of_step[: r["first_step"]]


def test_the_table_shows_memory_only_where_it_is_known():
    ours = schedule((40, 56, 40), 9, 8, "performance")

    def printed(memory):
        console = Console(width=140, record=True, file=io.StringIO())
        console.print(schedule_table(stage_rows(ours, (40, 56, 40), 9, memory), "performance"))
        return console.export_text()

    assert "1,575" in printed(None) and "memory" not in printed(None)
    assert "5 MiB" in printed({ours.stages[0]: 5 * 2**20})
    assert "0.983 of the voxels of constant-patch training" in printed(None)


def test_the_cases_in_use_are_shown_where_they_change():
    limits = PatchLimits((8, 8, 8), (8, 8, 8))
    config = CurriculumConfig(mode="efficiency", case_curriculum="pdl", case_epochs=40)
    rows = stage_rows(make_schedule(config, (40, 56, 40), 9, limits, 1000, 1, num_cases=100), (40, 56, 40), 9)
    assert rows[0]["cases"] == [25, 50] and rows[-1]["cases"] == [100, 100]
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(schedule_table(rows))
    console.print(schedule_table(stage_rows(schedule((40, 56, 40), 9, 8, "efficiency"), (40, 56, 40), 9)))
    text = console.export_text()
    assert "25 to 50" in text and text.count("cases") == 1


@pytest.mark.parametrize(("mode", "names"), [("performance", ("a", "b")), ("rpss", ("a",)), ("rpss", ())])
def test_the_picture_is_written_whole(tmp_path, mode, names):
    ours = schedule((40, 56, 40), 9, 8, mode, num_steps=5000)
    balance = [StageBalance(stage, 100, 1 / (stage.index + 2), {n: 0.1 for n in names}) for stage in ours.stages] if names else []
    plot_schedule(ours, tmp_path / "schedule.png", balance)
    assert (tmp_path / "schedule.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(list(tmp_path.iterdir())) == 1
