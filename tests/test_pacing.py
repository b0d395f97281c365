"""Schedules that fit a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgps_jax.architecture import PatchLimits
from pgps_jax.curriculum import CurriculumConfig, make_schedule
from pgps_jax.pacing import fit_to_seconds, rescale_rest, seconds_of

EIGHTS = PatchLimits((8, 8, 8), (8, 8, 8))


def maker(mode="efficiency", pacing="uniform", steps_per_epoch=25):
    config = CurriculumConfig(mode=mode, pacing=pacing)
    return lambda num_steps: make_schedule(config, (40, 56, 40), 9, EIGHTS, num_steps, steps_per_epoch)


def seconds(stage):
    return 0.01 + stage.voxels * 1e-6


@settings(deadline=None, max_examples=50)
@given(mode=st.sampled_from(["constant", "efficiency", "performance", "rpss", "reversed"]),
       pacing=st.sampled_from(["uniform", "volume", "equal-time"]), budget=st.floats(0.01, 3000))
def test_the_time_is_used_and_not_exceeded(mode, pacing, budget):
    make, max_steps = maker(mode, pacing), 5000
    steps = fit_to_seconds(make, seconds, budget, 25, max_steps)
    assert 1 <= steps <= max_steps
    assert steps == 1 or seconds_of(make(steps), seconds) <= budget
    if steps < max_steps and mode in ("constant", "performance"):  # their time rises evenly: one epoch more is too much
        assert seconds_of(make(steps + (25 if steps >= 25 else 1)), seconds) > budget
    assert steps < 25 or steps % 25 == 0
    if mode in ("efficiency", "performance"):
        assert make(steps).stage_at(steps - 1).patch_size == (40, 56, 40)


def test_a_generous_budget_leaves_the_number_of_steps_alone():
    assert fit_to_seconds(maker(), seconds, 1e9, 25, 5003) == 5003


@settings(deadline=None, max_examples=50)
@given(mode=st.sampled_from(["efficiency", "rpss"]), step=st.integers(0, 990), factor=st.floats(0.05, 4))
def test_the_rest_is_rescaled_and_the_past_is_kept(mode, step, factor):
    before = maker(mode)(1000)
    rest = seconds_of(before, seconds) - float(sum(seconds(before.stage_at(i)) for i in range(step)))
    after = rescale_rest(before, step, seconds, factor * rest, 5000)
    assert np.array_equal(after.stage_of_step[:step], before.stage_of_step[:step])
    assert after.stages == before.stages and len(after.case_pool_of_step) == after.num_steps
    assert after.stage_at(after.num_steps - 1) == before.stage_at(999)
    assert after.num_steps - step == pytest.approx(max(1, (1000 - step) * factor), abs=1)
    if mode == "efficiency":
        assert (np.diff(after.stage_of_step) >= 0).all()


@pytest.mark.parametrize("seconds_left", [1e3, 1e12, float("inf")])
def test_however_much_time_is_left_there_are_no_more_steps_than_allowed(seconds_left):
    after = rescale_rest(maker()(1000), 400, lambda stage: 1e-6, seconds_left, 1700)
    assert after.num_steps == 1700 and after.stage_at(1699).patch_size == (40, 56, 40)


def test_rescaling_to_the_time_it_takes_anyway_changes_nothing():
    before = maker()(1000)
    after = rescale_rest(before, 0, seconds, seconds_of(before, seconds) * (1 + 1e-9), 1000)
    assert np.array_equal(after.stage_of_step, before.stage_of_step)
    assert seconds_of(before, dict(zip(before.stages, map(seconds, before.stages), strict=True))) == pytest.approx(
        seconds_of(before, seconds))
