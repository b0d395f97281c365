"""The real loop on a tiny dataset: what it compiles and records, and how it goes on where memory does not suffice."""

import importlib
import json
from collections import Counter

import jax
import numpy as np
import pytest

from pgps_jax.config import NetworkConfig, RunConfig
from pgps_jax.curriculum import CurriculumConfig, Schedule, Stage, schedule_from_json
from pgps_jax.data.synthetic import write_phantom_dataset
from pgps_jax.main import CACHE_BYTES, cache_folder, main
from pgps_jax.report.run_log import read_records
from pgps_jax.train import loop, online_validation, setup, sizing
from pgps_jax.train.augment import AugmentConfig
from pgps_jax.train.programs import StagePrograms, enable_compilation_cache, stages_from
from pgps_jax.train.stopping import StopRequest
from pgps_jax.workspace import goes_on, open_experiment, write_run_folder

forecasting = importlib.import_module("pgps_jax.train.forecast")  # the package's attribute of this name may be the function
STEPS_PER_EPOCH = 4

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A raw dataset of tiny phantoms, and a workspace in which it is preprocessed."""
    folder = tmp_path_factory.mktemp("loop")
    raw = write_phantom_dataset(folder / "Dataset900_Tiny", num_cases=6, num_test=0, shape=(8, 8, 8))
    assert main(["preprocess", str(raw), "--workspace", str(folder / "work"), "--workers", "1"]) == 0
    enable_compilation_cache(cache_folder(), CACHE_BYTES)
    return raw, folder / "work"


def config_of(tiny, name, mode="efficiency", epochs=None, accumulate=1, **curriculum):
    raw, workspace = tiny
    epochs = epochs or {"efficiency": 3, "rpss": 2}[mode]  # enough for three patch sizes, and few enough to compile
    return RunConfig(
        raw, workspace, name=name, epochs=epochs, steps_per_epoch=STEPS_PER_EPOCH, validation_steps=1, workers=1, accumulate=accumulate,
        network=NetworkConfig(base_features=4), augment=AugmentConfig(preset="light"), curriculum=CurriculumConfig(mode=mode, **curriculum))


def trained(config, spoken=()):
    """Train from where the run stands, as `train` of the command line does before it measures; returns the run folder."""
    run = open_experiment(config)
    if not goes_on(config):
        run = sizing.sized(run, lambda _: None)
    write_run_folder(run, {})
    loop.train(run, spoken)
    return run.folder


def stopped(monkeypatch, config, steps):
    """Train until some number of steps is done."""
    class Stops(StopRequest):
        asked = 0

        @property
        def reason(self):
            self.asked += 1
            return "test" if self.asked == steps else None

    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopRequest", Stops)
        with pytest.raises(loop.Stopped):
            trained(config)


def schedule_in(folder):
    return schedule_from_json(json.loads((folder / "schedule.json").read_text()))


def records(folder, kind):
    return [r for r in read_records(folder / "metrics.jsonl") if r["kind"] == kind]


def events(folder, kind):
    return [e for e in read_records(folder / "events.jsonl") if e["kind"] == kind]


@pytest.fixture
def sessions(monkeypatch):
    """The programs of every training session."""
    made = []

    def kept(*arguments):
        made.append(setup.stage_programs(*arguments))
        return made[-1]

    monkeypatch.setattr(loop, "stage_programs", kept)
    return made


# -------------------------------------------------------------------------------------------------------------------- programs


@pytest.mark.parametrize("mode", ["efficiency", "rpss"])
def test_over_a_whole_run_each_stage_compiles_exactly_once(tiny, sessions, mode):
    folder = trained(config_of(tiny, f"once_{mode}", mode))
    schedule, (programs,) = schedule_in(folder), sessions
    in_use = stages_from(schedule, 0)
    assert len(in_use) > 2 and len(records(folder, "step")) == schedule.num_steps
    assert programs.compilations == dict.fromkeys(in_use, 1)

    timings = records(folder, "stage")
    first_steps = [int(np.argmax(schedule.stage_of_step == stage.index)) for stage in in_use]
    assert [(r["stage"], r["step"]) for r in timings] == [(s.index, step) for s, step in zip(in_use, first_steps, strict=True)]
    for record in timings:
        (step,) = [r for r in records(folder, "step") if r["step"] == record["step"]]
        assert record["first_step_seconds"] > 0 and record["trace_seconds"] > 0 and record["stall_seconds"] >= 0
        if record["stall_seconds"] > 1:
            assert max(step["seconds"], record["first_step_seconds"]) < record["stall_seconds"], "waiting is no part of a tiny step"
    assert (folder / "train.log").read_text().count(", first step ") == len(in_use)


@pytest.mark.parametrize("mode", ["efficiency", "rpss"])
def test_over_a_resume_each_stage_still_in_use_compiles_exactly_once(tiny, sessions, monkeypatch, mode):
    config = config_of(tiny, f"resumed_{mode}", mode)
    stopped(monkeypatch, config, 6)
    schedule = schedule_in(trained(config))
    before, after = sessions
    assert set(before.compilations.values()) == {1} and set(before.compilations) <= set(stages_from(schedule, 0))
    assert after.compilations == dict.fromkeys(stages_from(schedule, 6), 1)


def test_random_sizes_are_compiled_in_the_order_of_their_first_use_and_those_never_drawn_are_not(tiny, monkeypatch):
    config = config_of(tiny, "few_draws", "rpss")
    schedule = open_experiment(config).schedule
    in_use, asked, prefetch = stages_from(schedule, 0), [], StagePrograms.prefetch
    assert len(in_use) < min(len(schedule.stages), schedule.num_steps)

    def seen(self, *stages):
        asked.append(list(stages))
        prefetch(self, *stages)

    monkeypatch.setattr(StagePrograms, "prefetch", seen)
    trained(config)
    assert asked[0] == in_use and {stage for stages in asked for stage in stages} == set(in_use)


def test_stages_that_come_back_are_random_order_however_few_steps_there_are():
    stages = tuple(Stage(i, (8 + 4 * i,) * 3, 1) for i in range(3))

    def starts(*stage_of_step):
        return loop.run_starts(Schedule(stages, np.array(stage_of_step, np.int32), np.ones(len(stage_of_step), np.int32)))

    assert starts(0, 0, 1, 2, 2) == {0: 0, 2: 1, 3: 2}
    assert starts(2, 2, 0) == {0: 2, 2: 0}
    assert starts(0, 1, 0) == {}


# ------------------------------------------------------------------------------------------------------- batches and memory


OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes")


def once(function, at_call=1):
    """The function, but that one of its calls runs out of memory."""
    calls = []

    def runs_out(*arguments, **named):
        calls.append(arguments)
        if len(calls) == at_call:
            raise OUT_OF_MEMORY
        return function(*arguments, **named)

    return runs_out


def assert_halved_once(folder, planned, index):
    """One stage has half its batch, and every step was made."""
    expected = [stage.batch_size // 2 if stage.index == index else stage.batch_size for stage in planned.stages]
    assert [stage.batch_size for stage in schedule_in(folder).stages] == expected
    assert [event["stage"] for event in events(folder, "halved")] == [index]
    assert [r["step"] for r in records(folder, "step")] == list(range(planned.num_steps))


class Lost:
    """A number that cannot be fetched."""

    def __float__(self):
        raise OUT_OF_MEMORY


def test_out_of_memory_seen_when_a_step_is_fetched_halves_the_stage_of_that_step_once(tiny, monkeypatch):
    config = config_of(tiny, "fetched", "rpss")
    planned = open_experiment(config).schedule
    taken = planned.stage_of_step
    step = next(s for s in range(len(taken) - 1) if taken[s] in taken[:s] and taken[s + 1] != taken[s])  # no first step: not waited for
    get, asked = StagePrograms.get, Counter()

    def losing(self, stage):
        program = get(self, stage)
        asked[stage.index] += 1
        uses_before = np.count_nonzero(taken[:step] == taken[step])
        if stage.index != taken[step] or asked[stage.index] != uses_before + 2:  # the program is asked for once more, to wait for it
            return program

        def lost(*arguments):
            state, metrics = program(*arguments)
            return state, metrics._replace(loss=Lost())

        return lost

    monkeypatch.setattr(StagePrograms, "get", losing)
    assert_halved_once(trained(config), planned, taken[step])


@pytest.mark.parametrize("accumulate", [1, "auto"])
def test_out_of_memory_in_validation_makes_its_batch_and_that_of_the_planned_patch_lighter(tiny, monkeypatch, accumulate):
    config = config_of(tiny, f"validated_{accumulate}", epochs=2, accumulate=accumulate)
    planned, batches = open_experiment(config).schedule, []
    put, parts = once(online_validation.put), []
    make = online_validation.make_validation_step

    def seen(batch, device):
        batches.append(len(batch.label))
        return put(batch, device)

    def made(graphdef, labels, batch_dice, in_parts):
        parts.append(in_parts)
        return make(graphdef, labels, batch_dice, in_parts)

    monkeypatch.setattr(online_validation, "put", seen)
    monkeypatch.setattr(online_validation, "make_validation_step", made)
    folder = trained(config)
    last = planned.stages[-1]
    assert last.batch_size == 2
    if accumulate == "auto":
        assert parts == [1, 2] and batches == [2, 2, 2]
        assert (schedule_in(folder).stages[-1].batch_size, schedule_in(folder).stages[-1].parts) == (2, 2)
    else:
        assert parts == [1, 1] and batches == [2, 1, 1]
        assert_halved_once(folder, planned, last.index)


def test_out_of_memory_while_the_state_is_copied_for_a_checkpoint_halves_the_stage_of_that_step(tiny, monkeypatch):
    config = config_of(tiny, "copied", epochs=2)
    planned = open_experiment(config).schedule
    monkeypatch.setattr(loop.jnp, "copy", once(loop.jnp.copy))
    border = next(step for step in loop.run_starts(planned) if step)  # the first checkpoint
    assert_halved_once(trained(config), planned, planned.stage_of_step[border - 1])


def test_out_of_memory_while_the_forecast_compiles_halves_the_largest_stage(tiny, monkeypatch):
    config = config_of(tiny, "forecast", epochs=2)
    planned = open_experiment(config).schedule
    monkeypatch.setattr(forecasting, "TENSORS", 10**12)
    monkeypatch.setattr(StagePrograms, "get", once(StagePrograms.get))
    assert_halved_once(trained(config), planned, planned.stages[-1].index)


def test_a_run_resumed_after_a_halving_keeps_the_halved_batch_and_the_old_program_is_let_go(tiny, sessions, monkeypatch):
    config = config_of(tiny, "halved")
    planned = open_experiment(config).schedule
    get, held = once(StagePrograms.get, at_call=2), []  # its first step, after the wait for its program

    def watched(self, stage):
        held.append(planned.stages[0] in self._programs)
        return get(self, stage)

    with monkeypatch.context() as patch:
        patch.setattr(StagePrograms, "get", watched)
        stopped(monkeypatch, config, 5)
    assert held[1] and not any(held[2:])
    folder = trained(config)
    assert_halved_once(folder, planned, 0)
    before, after = sessions
    assert before.compilations[schedule_in(folder).stages[0]] == before.compilations[planned.stages[0]] == 1
    assert after.compilations == dict.fromkeys(stages_from(schedule_in(folder), 5), 1)


def test_batch_sizes_that_fill_the_device_are_stored_and_read_again_on_resume(tiny, sessions, monkeypatch):
    config = config_of(tiny, "filled", epochs=1, batch_policy="device-memory")
    monkeypatch.setattr(sizing, "device_budget", lambda fraction: int(fraction * 300e6))
    stopped(monkeypatch, config, 2)
    monkeypatch.setattr(sizing, "device_budget", lambda fraction: 10**12)  # of another machine, which is not asked
    folder = trained(config)
    stages = schedule_in(folder).stages
    assert max(stage.batch_size for stage in stages) > 2
    assert sessions[1].compilations == dict.fromkeys(stages_from(schedule_in(folder), 2), 1)
    assert [r["step"] for r in records(folder, "step")] == list(range(STEPS_PER_EPOCH))


def test_the_log_has_the_stage_table_with_memory_and_what_was_said_before_it_began(tiny):
    folder = trained(config_of(tiny, "told", epochs=1), ["patch 8x8x8: batch 7 needs 3 GiB, the largest that fits"])
    text = (folder / "train.log").read_text()
    assert "batch 7 needs 3 GiB" in text and "memory (forecast)" in text and "MiB" in text and "voxels of constant-patch training" in text
    assert [e["text"] for e in events(folder, "note")] == ["patch 8x8x8: batch 7 needs 3 GiB, the largest that fits"]
