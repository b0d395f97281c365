"""Records of steps and epochs, averages as nnU-Net's, and forecasts that follow what was measured."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgps_jax.curriculum import Schedule, Stage
from pgps_jax.report.run_log import RunLog
from pgps_jax.train.health import NotFinite, StageTooLarge, memory_errors_of
from pgps_jax.train.meter import Meter
from pgps_jax.train.step import StepMetrics, ValidationCounts

STAGES = (Stage(0, (8, 8, 8), 1), Stage(1, (16, 16, 16), 1), Stage(2, (32, 32, 32), 1))
SCHEDULE = Schedule(STAGES, np.repeat(np.arange(3, dtype=np.int32), 4), np.ones(12, np.int32))


@pytest.fixture
def log(tmp_path):
    log = RunLog(tmp_path)
    yield log
    log.close()


def counts(tp, fp, fn, loss=0.5):
    return ValidationCounts(*(jnp.asarray(x, jnp.float32) for x in (tp, fp, fn)), jnp.float32(loss))


def test_a_step_is_recorded_when_the_next_one_is_noted(log):
    meter = Meter(log, SCHEDULE)
    meter.note(0, StepMetrics(jnp.float32(1.5), jnp.float32(2.0)), 0.01)
    assert log.of_kind("step") == []
    meter.note(1, StepMetrics(jnp.float32(1.0), jnp.float32(1.0)), 0.0)
    (record,) = log.of_kind("step")
    assert (record["step"], record["loss"], record["gradient_norm"], record["input_wait"]) == (0, 1.5, 2.0, 0.01)
    meter.settle()
    assert len(log.of_kind("step")) == 2


def test_a_loss_that_is_not_finite_is_recorded_as_none(log):
    meter = Meter(log, SCHEDULE)
    meter.note(0, StepMetrics(jnp.float32(np.nan), jnp.float32(np.inf)), 0.0)
    with pytest.raises(NotFinite, match="step 0"):
        meter.settle()
    assert log.of_kind("step")[0]["loss"] is None and log.of_kind("step")[0]["gradient_norm"] is None


def test_pseudo_dice_is_taken_over_all_batches_and_a_class_not_sampled_is_left_out(log):
    meter = Meter(log, SCHEDULE)
    record = meter.epoch(0, 0, 3, 0.01, [counts([1, 0], [1, 0], [0, 0]), counts([3, 0], [0, 0], [2, 0])], 0.0)
    assert record["pseudo_dice"] == [2 * 4 / (2 * 4 + 1 + 2), None]
    assert record["pseudo_dice_mean"] == record["pseudo_dice_ema"] == 8 / 11


def test_the_moving_average_keeps_nine_tenths_also_across_a_resume(log):
    Meter(log, SCHEDULE).epoch(0, 0, 3, 0.01, [counts([1, 1], [0, 0], [0, 0])], 0.0)
    record = Meter(log, SCHEDULE).epoch(1, 4, 7, 0.01, [counts([1, 1], [2, 2], [0, 0])], 0.0)
    assert record["pseudo_dice_ema"] == pytest.approx(0.9 * 1.0 + 0.1 * 0.5)
    assert Meter(log, SCHEDULE).best_ema() == 1.0


def test_an_epoch_averages_its_own_steps_only(log):
    for step, loss in enumerate([9.0, 9.0, 9.0, 9.0, 1.0, 2.0, 3.0, 6.0]):
        log.record("step", step, stage=0, loss=loss, seconds=1.0, input_wait=0.25)
    record = Meter(log, SCHEDULE).epoch(1, 4, 7, 0.01, [counts([1, 1], [0, 0], [0, 0])], 2.0)
    assert record["train_loss"] == 3.0
    assert record["seconds"] == 6.0
    assert record["input_wait_seconds"] == 1.0


def test_a_stage_not_seen_lies_on_the_line_through_the_stages_seen(log):
    seconds = {0: 0.1 + 512e-5, 1: 0.1 + 4096e-5}
    for step in range(8):
        log.record("step", step, stage=step // 4, loss=0.0, seconds=seconds[step // 4], input_wait=0.0)
    meter = Meter(log, SCHEDULE)
    assert meter.seconds_per_step(STAGES[1]) == pytest.approx(seconds[1])
    assert meter.seconds_per_step(STAGES[2]) == pytest.approx(0.1 + 32768e-5)
    assert "about" in meter.forecast(7)


@pytest.mark.parametrize("fixed", [0.5, -0.004])
def test_stages_that_shrink_are_forecast_cheaper_than_the_cheapest_seen_and_never_below_their_voxels(log, fixed):
    stages = tuple(Stage(i, (size,) * 3, 1) for i, size in enumerate((32, 24, 8)))
    seconds = [fixed + 1e-5 * stage.voxels for stage in stages]
    for step in range(8):
        log.record("step", step, stage=step // 4, loss=0.0, seconds=seconds[step // 4], input_wait=0.0)
    expected = seconds[2] if fixed > 0 else seconds[1] * 8**3 / 24**3
    meter = Meter(log, Schedule(stages, SCHEDULE.stage_of_step, SCHEDULE.case_pool_of_step))
    assert meter.seconds_per_step(stages[2]) == pytest.approx(expected)


def test_validation_is_timed_from_the_second_epoch_on_because_the_first_one_compiles(log):
    meter = Meter(log, SCHEDULE)
    for epoch, seconds in enumerate((60.0, 5.0, 6.0)):
        assert meter.seconds_per_validation() == (None, None, 5.0)[epoch]
        meter.epoch(epoch, 0, 3, 0.01, [counts([1, 1], [0, 0], [0, 0])], seconds)


def test_with_one_stage_seen_the_forecast_is_an_upper_limit(log):
    for step in range(4):
        log.record("step", step, stage=0, loss=0.0, seconds=1.0, input_wait=0.0)
    assert "at most" in Meter(log, SCHEDULE).forecast(3)


class OutOfMemory:
    """A number that cannot be fetched, because the device ran out of memory while it computed it."""

    def __float__(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes")


def test_out_of_memory_is_blamed_on_the_stage_of_the_step_that_was_waited_for(log):
    meter = Meter(log, SCHEDULE)
    meter.note(3, StepMetrics(OutOfMemory(), jnp.float32(1)), 0.0)
    with pytest.raises(StageTooLarge) as caught, memory_errors_of(STAGES[1]):
        meter.note(4, StepMetrics(jnp.float32(1), jnp.float32(1)), 0.0)
    assert caught.value.stage == STAGES[0]
    meter.settle()
    assert not log.of_kind("step"), "what could not be fetched is not waited for again"


def test_steps_of_a_stage_are_counted_over_its_stretches(log):
    meter = Meter(log, Schedule(STAGES, np.array([0, 1, 0, 0], np.int32), np.ones(4, np.int32)))
    counted = []
    for step in range(4):
        meter.note(step, StepMetrics(jnp.float32(1), jnp.float32(1)), 0.0)
        counted.append(meter.steps_in_stage)
    assert counted == [1, 1, 2, 3]


def test_the_time_left_is_unknown_before_the_first_step_and_nothing_after_the_last(log):
    meter = Meter(log, SCHEDULE)
    assert math.isnan(meter.seconds_left(0))
    for step in range(12):
        log.record("step", step, stage=step // 4, loss=0.0, seconds=1.0 + step // 4, input_wait=0.0)
    assert meter.seconds_left(7) == 4 * 3.0 and meter.seconds_left(11) == 0
