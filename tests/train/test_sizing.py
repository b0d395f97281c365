"""What a machine has to say before a run's first step: batch sizes, pacing and length; and corrections on the way."""

import dataclasses
import math
import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgps_jax.config import NetworkConfig, RunConfig
from pgps_jax.curriculum import CurriculumConfig, Schedule, Stage, schedule_from_json
from pgps_jax.data.synthetic import write_phantom_dataset
from pgps_jax.errors import InputError
from pgps_jax.json_file import read_json
from pgps_jax.main import main
from pgps_jax.report.run_log import read_records
from pgps_jax.train import sizing
from pgps_jax.train.device import open_device
from pgps_jax.train.forecast import forecast
from pgps_jax.train.memory import MOST_ELEMENTS, BatchChoice, choose_batch_size
from pgps_jax.train.meter import Meter
from pgps_jax.train.optim import OptimConfig
from pgps_jax.train.programs import ProgramTiming, StagePrograms
from pgps_jax.train.setup import initial_state
from pgps_jax.train.sizing import in_time, note_on_devices, sized
from pgps_jax.train.state import state_bytes
from pgps_jax.workspace import (
    check_numbers,
    learning_rates,
    note_on_warm_up,
    notes_on_schedule,
    open_experiment,
    planned_schedule,
    refuse_strange_schedule,
    with_schedule,
)

HOUR = 3600 * sizing.SHARE_OF_STEPS

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizing")
    raw = write_phantom_dataset(folder / "Dataset900_Tiny", num_cases=6, num_test=0, shape=(12, 12, 12))
    assert main(["preprocess", str(raw), "--workspace", str(folder / "work"), "--workers", "1"]) == 0
    return open_experiment(RunConfig(raw, folder / "work", network=NetworkConfig(base_features=4)))


def changed(run, mode="efficiency", curriculum=None, **config):
    """The run under another config."""
    config = dataclasses.replace(run.config, curriculum=CurriculumConfig(mode=mode, **(curriculum or {})), **config)
    schedule = planned_schedule(config, run.configuration, len(run.train_ids))
    return with_schedule(dataclasses.replace(run, config=config), schedule)


def by_voxels(run, device, stage):
    return 1e-3 + 1e-6 * stage.voxels


@pytest.fixture
def measured(monkeypatch):
    """Steps take the time of `by_voxels`; the stages that were measured."""
    seen = []
    monkeypatch.setattr(sizing, "seconds_per_step", lambda run, device, stage: seen.append(stage) or by_voxels(run, device, stage))
    return seen


# Pacing and length


def test_equal_time_pacing_measures_the_ends_and_gives_every_patch_the_same_time(tiny, measured):
    run = sized(changed(tiny, curriculum=dict(pacing="equal-time"), epochs=20_000, steps_per_epoch=1), print)
    spent = np.array([n * by_voxels(run, None, stage) for stage, _, n in run.schedule.runs()])
    assert len(measured) == 2 and len(spent) > 2
    np.testing.assert_allclose(spent, spent.mean(), rtol=0.03)
    by_steps = changed(tiny, curriculum=dict(pacing="equal-time"), epochs=20_000, steps_per_epoch=1).schedule
    assert [n for *_, n in run.schedule.runs()] != [n for *_, n in by_steps.runs()]  # what voxels alone would say


@pytest.mark.parametrize("mode", ["constant", "efficiency", "performance"])
def test_the_length_fits_the_hours_with_the_validation_of_every_epoch(tiny, measured, mode):
    run = sized(changed(tiny, mode, epochs=4000, steps_per_epoch=10, validation_steps=50, max_hours=0.02), print)
    planned = Stage(0, run.configuration.patch_size, run.configuration.batch_size)
    per_epoch = 50 / 3 * by_voxels(run, None, planned)

    def takes(schedule):
        return sum(n * by_voxels(run, None, stage) for stage, _, n in schedule.runs()) + per_epoch * schedule.num_steps / 10

    assert run.num_steps % 10 == 0 and 1 < run.num_steps < 40_000
    assert takes(run.schedule) <= 0.02 * HOUR < 1.05 * takes(run.schedule)
    assert run.schedule.stages[-1].patch_size == run.configuration.patch_size


def test_batches_of_patches_that_only_a_shorter_run_uses_are_sized_too(tiny, measured):
    asked = changed(tiny, epochs=4, steps_per_epoch=100, max_hours=4.3e-4, accumulate=2)
    run = sized(asked, print)
    assert run.num_steps == 300
    assert {stage.patch_size for stage in run.schedule.stages} - {stage.patch_size for stage in asked.schedule.stages}
    assert {stage.parts for stage in run.schedule.stages} == {2}


def test_hours_are_fitted_with_the_batches_that_memory_allows(tiny, measured, monkeypatch):
    monkeypatch.setattr(sizing, "choose_batch_size", lambda compile_at, stage, *_, **__: BatchChoice(7, 0, 0, ""))
    filled = dict(batch_policy="device-memory")
    run = sized(changed(tiny, curriculum=filled, epochs=4000, steps_per_epoch=10, validation_steps=1, max_hours=0.02), print)
    assert {stage.batch_size for stage in measured} == {stage.batch_size for stage in run.schedule.stages} == {7}
    steps = sum(n * by_voxels(run, None, stage) for stage, _, n in run.schedule.runs())
    assert 0.5 * 0.02 * HOUR < steps < 0.02 * HOUR


def test_cases_are_added_sooner_in_a_run_that_has_to_be_short(tiny, measured):
    cases = dict(case_curriculum="pdl", case_epochs=10)
    run = sized(changed(tiny, "constant", cases, epochs=4000, steps_per_epoch=10, max_hours=0.01), print)
    pool = run.schedule.case_pool_of_step
    whole = planned_schedule(run.config, run.configuration, len(run.train_ids)).case_pool_of_step
    assert run.num_steps < len(whole) / 4 and pool[-1] == len(run.train_ids)
    for cases in range(1, len(run.train_ids) + 1):
        assert np.argmax(pool >= cases) == pytest.approx(np.argmax(whole >= cases) * len(pool) / len(whole), abs=1)


def test_the_learning_rate_falls_to_nothing_in_runs_that_fit_a_time_and_is_nnunets_in_all_others(tiny):
    for config, steps in ((dict(epochs=12, max_hours=1.0), 1), (dict(epochs=12), 100), (dict(epochs=1), 100)):
        run = changed(tiny, steps_per_epoch=100, **config)
        epochs = run.num_steps // steps
        expected = np.repeat(0.01 * (1 - np.arange(epochs) / epochs) ** 0.9, steps)
        np.testing.assert_allclose(run.learning_rates, expected, rtol=1e-6)
    short = changed(tiny, steps_per_epoch=100, epochs=1)
    cut = Schedule(short.schedule.stages, short.schedule.stage_of_step[:50], short.schedule.case_pool_of_step[:50])
    assert learning_rates(short.config, short.configuration, cut)[-1] < 0.05 * short.learning_rates[-1]


class Clock(Meter):
    """Steps and validation take what it is told."""

    def __init__(self, spent, step, validation=0.0):
        self.spent, self.step, self.validation = spent, step, validation

    def seconds_spent(self):
        return self.spent

    def seconds_per_step(self, stage):
        return self.step

    def seconds_per_validation(self):
        return self.validation


def under_way(tiny, folder, steps=5000, epochs=100):
    """A run of 5000 of 10000 steps that fit an hour if each takes HOUR / 5000 seconds."""
    run = changed(tiny, "constant", epochs=epochs, steps_per_epoch=100, max_hours=1.0)
    whole = run.schedule
    return with_schedule(dataclasses.replace(run, folder=folder),
                         Schedule(whole.stages, whole.stage_of_step[:steps], whole.case_pool_of_step[:steps]))


def test_a_run_that_turns_out_fast_is_stretched_to_its_epochs_and_not_beyond(tiny, tmp_path):
    run = under_way(tiny, tmp_path)
    fast = Clock(spent=0.4 * HOUR / 5, step=0.4 * HOUR / 5000)
    assert in_time(run, fast, 1000, lambda: True, print).num_steps == 10_000
    assert schedule_from_json(read_json(tmp_path / "schedule.json")).num_steps == 10_000


@settings(deadline=None, max_examples=30)
@given(done=st.integers(1, 4999), speed=st.floats(0.05, 20), validation=st.floats(0, 30))
def test_what_is_left_fits_the_hours_whenever_it_is_corrected(tiny, tmp_path_factory, done, speed, validation):
    run = under_way(tiny, tmp_path_factory.mktemp("run"))
    step = HOUR / 5000 * speed
    spent = done * (step + validation / 100)
    corrected = in_time(run, Clock(spent, step, validation), done, lambda: True, print)
    total = spent + (corrected.num_steps - done) * (step + validation / 100)
    assert done < corrected.num_steps <= 10_000
    slack = sizing.WORTH_CORRECTING * 5000 * (step + validation / 100) + step
    assert total <= max(HOUR, spent) + slack
    assert total >= HOUR - slack or corrected.num_steps == 10_000


def test_validation_that_was_not_timed_yet_is_counted_as_forward_passes(tiny, tmp_path):
    run = under_way(tiny, tmp_path)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, validation_steps=300))
    corrected = in_time(run, Clock(0.0, HOUR / 5000, None), 100, lambda: True, print)
    assert corrected.num_steps == pytest.approx(100 + 2500, rel=0.02)  # validation takes as long as the steps


def test_a_change_is_stored_after_the_checkpoint_and_not_without_it(tiny, tmp_path):
    run, slow = under_way(tiny, tmp_path), Clock(0.0, HOUR / 1000)
    stored = []
    assert in_time(run, slow, 100, lambda: stored.append((tmp_path / "schedule.json").exists()) or False, print) is run
    assert stored == [False] and not (tmp_path / "schedule.json").exists()
    assert in_time(run, slow, 100, lambda: True, print).num_steps < 5000
    assert (tmp_path / "schedule.json").exists()


def test_a_run_that_is_in_time_or_at_its_end_is_left_alone(tiny, tmp_path):
    def never():
        raise AssertionError("nothing is to be saved")

    run = under_way(tiny, tmp_path)
    assert in_time(run, Clock(HOUR / 5, HOUR / 5000 * 1.005), 1000, never, print) is run
    assert in_time(run, Clock(2 * HOUR, 1.0), 5000, never, print) is run


def test_a_run_of_one_stage_that_was_measured_wrong_is_corrected_at_the_end_of_an_epoch(tiny, monkeypatch, capsys):
    monkeypatch.setattr(sizing, "seconds_per_step", lambda run, device, stage: HOUR / 15)
    monkeypatch.setattr(Meter, "seconds_spent", lambda self: 0.2 * HOUR)
    monkeypatch.setattr(Meter, "seconds_per_step", lambda self, stage: HOUR / 25)
    monkeypatch.setattr(Meter, "seconds_per_validation", lambda self: 0.0)
    config = tiny.config
    arguments = ["train", str(config.dataset), "--workspace", str(config.workspace), "--name", "hurried", "--mode", "constant",
                 "--epochs", "12", "--steps-per-epoch", "3", "--max-hours", "1", "--validation-steps", "1", "--no-mirror-tta",
                 "--network.base-features", "4", "--augment.preset", "none", "--workers", "1"]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "12 of 36 steps fit 1 hours" in printed and "12 steps were planned; 23 keep the budget of 1 hours" in printed
    assert [r["step"] for r in read_records(run_of(config) / "metrics.jsonl") if r["kind"] == "step"] == list(range(36))


def run_of(config):
    return config.workspace / "runs" / "Dataset900_Tiny" / "hurried" / "fold_0"


# Batches


class Compiled(jax.stages.Compiled):
    """A program of which only the size is known."""

    def __init__(self, total):
        self.total = total

    def memory_analysis(self):
        return types.SimpleNamespace(argument_size_in_bytes=self.total, output_size_in_bytes=0, alias_size_in_bytes=0,
                                     temp_size_in_bytes=0, generated_code_size_in_bytes=0)  # fmt: skip


class Measured(StagePrograms):
    """Programs of a known size that are not made."""

    def __init__(self, size):
        self.size = size

    def get(self, stage):
        pass

    def timing(self, stage):
        return ProgramTiming(stage, 0.0, 0.0, False, 0.0, self.size)


@pytest.mark.parametrize("processes", [0, 3])
def test_batches_that_fill_a_cpus_memory_leave_room_for_what_the_host_needs(tiny, processes):
    run = changed(tiny, "constant", loader_processes=processes)
    device = open_device((), "float32")
    _, state = initial_state(run, device)
    stage, size, budget = run.schedule.stages[0], 10**6, 3 * 2**30

    def with_batch(batch):
        return dataclasses.replace(stage, batch_size=batch)

    batch = choose_batch_size(
        lambda batch: Compiled(size * batch), stage, budget, elements_per_patch=1,
        outside=lambda batch: sizing.bytes_outside(run, device, state_bytes(state), with_batch(batch))).batch_size

    def forecast_of(batch):
        filled = with_schedule(run, dataclasses.replace(run.schedule, stages=(with_batch(batch),)))
        return forecast(filled, device, state, Measured(size * batch), print, budget, budget)

    assert forecast_of(batch)
    with pytest.raises(InputError, match="of memory in stage 0"):
        forecast_of(math.ceil(1.1 * batch))


def test_a_program_that_fills_an_accelerator_is_not_refused_for_the_state_that_lies_there_already(tiny, monkeypatch):
    run, device = changed(tiny, "constant"), open_device((), "float32")
    _, state = initial_state(run, device)
    accelerator, free = device._replace(platform="gpu"), 10**6
    monkeypatch.setattr("pgps_jax.train.forecast.device_budget", lambda fraction: free)
    largest = free + state_bytes(state) - sizing.waiting_bytes(run, accelerator, run.schedule.stages[0])
    assert forecast(run, accelerator, state, Measured(largest), print)
    with pytest.raises(InputError, match="on each device"):
        forecast(run, accelerator, state, Measured(largest + 1), print)


def test_all_devices_share_the_batches_that_fill_their_memory_whatever_was_planned(tiny, monkeypatch):
    opened, multiples = [], []

    def choose(*_, multiple_of, **__):
        multiples.append(multiple_of)
        return BatchChoice(3, 0, 0, "")

    monkeypatch.setattr(sizing, "open_device", lambda stages, precision: opened.append(stages) or open_device(stages, precision))
    monkeypatch.setattr(sizing, "choose_batch_size", choose)
    sizing.fill_memory(tiny, tiny.schedule.stages, print)
    assert opened == [()] and set(multiples) == {open_device((), "float32").count}


def test_the_largest_tensor_is_two_features_wide_or_as_wide_as_the_logits(tiny):
    architecture = dataclasses.replace(tiny.configuration.architecture, features_per_stage=(32, 64, 128))
    run = dataclasses.replace(tiny, configuration=dataclasses.replace(tiny.configuration, architecture=architecture))
    stage = Stage(0, (128, 128, 128), 2)
    assert MOST_ELEMENTS // sizing.largest_activation(run, stage) == 15
    many = dataclasses.replace(run.labels, names=tuple(map(str, range(120))), values=tuple(range(120)))
    assert sizing.largest_activation(dataclasses.replace(run, labels=many), stage) == 120 * 128**3


def test_the_share_of_the_dataset_is_that_of_its_volumes_in_planar_configurations_too(tiny):
    whole = sizing.dataset_voxels(tiny)
    planar = dataclasses.replace(tiny.configuration, name="2d", is_2d=True, median_shape=(1.0, 12.0, 12.0))
    assert whole == math.prod(tiny.configuration.median_shape) * 6
    assert sizing.dataset_voxels(dataclasses.replace(tiny, configuration=planar)) == whole


# Notes and refusals


def stairs(*lengths, batches=None):
    stages = tuple(Stage(i, (8, 8, 8 * (i + 1)), batch) for i, batch in enumerate(batches or [2] * len(lengths)))
    return Schedule(stages, np.repeat(np.arange(len(lengths), dtype=np.int32), lengths), np.ones(sum(lengths), np.int32))


def test_devices_that_would_stand_idle_are_noted_with_the_batches_that_make_them():
    odd = stairs(5, 5, 5, batches=[128, 7, 3])
    assert note_on_devices(odd, 1) is None and note_on_devices(stairs(5, batches=[8]), 4) is None
    note = note_on_devices(odd, 2)
    assert "1 of 2 devices" in note and "batches of 7, 3 patches" in note and "multiples of 2" in note
    assert "2 of 4 devices" in note_on_devices(stairs(5, 5, batches=[6, 8]), 4)


def test_notes_name_each_flag_that_a_schedule_cannot_show(tiny):
    plain = changed(tiny).config
    assert notes_on_schedule(plain, stairs(5, 5)) == []
    asked = dataclasses.replace(plain, max_hours=2.0, accumulate="auto", optim=OptimConfig(warmup_steps=6),
                                curriculum=CurriculumConfig(pacing="equal-time", batch_policy="device-memory"))
    notes = notes_on_schedule(asked, stairs(5, 9))
    for flag in ("--max-hours", "--accumulate auto", "--pacing equal-time", "--batch-policy device-memory", "--optim.warmup-steps 6"):
        assert sum(flag in note for note in notes) == 1
    assert len(notes) == 5
    assert "in 1 of 2 stages, the shortest of which has 5 steps" in note_on_warm_up(asked, stairs(5, 9))
    assert note_on_warm_up(asked, stairs(6, 9)) is None


@pytest.mark.parametrize(("flags", "words"), [
    *((dict(max_hours=hours), "--max-hours") for hours in (-1.0, 0.0, math.nan, math.inf)),
    (dict(curriculum=CurriculumConfig(schedule_seed=-1)), "--schedule-seed -1"),
    (dict(curriculum=CurriculumConfig(case_epochs=0)), "--case-epochs 0"),
    (dict(curriculum=CurriculumConfig(memory_fraction=1.5)), "--memory-fraction 1.5"),
    (dict(optim=OptimConfig(learning_rate=math.nan)), "--optim.learning-rate nan"),
    (dict(optim=OptimConfig(warmup_steps=-1)), "--optim.warmup-steps -1"),
    (dict(optim=OptimConfig(momentum=1.0)), "--optim.momentum 1.0"),
    (dict(seed=-1), "--seed -1"),
    (dict(epochs=0), "--epochs 0"),
    (dict(accumulate=0), "--accumulate 0"),
])  # fmt: skip
def test_numbers_out_of_their_range_are_refused_by_flag(tiny, flags, words):
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        check_numbers(dataclasses.replace(tiny.config, **flags))


def test_a_stored_schedule_that_this_network_or_dataset_cannot_have_is_refused(tiny, tmp_path):
    run, where = changed(tiny, epochs=4, steps_per_epoch=10), tmp_path / "schedule.json"
    steps, pool = run.schedule.stage_of_step, run.schedule.case_pool_of_step
    refuse_strange_schedule(run.config, run.configuration, len(run.train_ids), run.schedule, where)
    larger = dataclasses.replace(run.schedule.stages[-1], patch_size=tuple(2 * n for n in run.configuration.patch_size))
    odd = dataclasses.replace(run.schedule.stages[0], patch_size=(3, 4, 4))
    for changes, words in (
        (dict(stages=(*run.schedule.stages[:-1], larger)), "patches of"),
        (dict(stages=(odd, *run.schedule.stages[1:])), "patches of"),
        (dict(case_pool_of_step=pool + 1), "cases in use"),
        (dict(stage_of_step=np.repeat(steps, 2), case_pool_of_step=np.repeat(pool, 2)), "steps"),
    ):
        with pytest.raises(InputError, match=f"schedule.json: .*{words}.*--fresh"):
            refuse_strange_schedule(run.config, run.configuration, len(run.train_ids), dataclasses.replace(run.schedule, **changes), where)
