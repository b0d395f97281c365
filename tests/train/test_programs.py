"""The stage manager: every program once, ahead of time, and errors where they belong."""

import os
import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgps_jax.architecture import PatchLimits
from pgps_jax.curriculum import CurriculumConfig, Stage, make_schedule
from pgps_jax.train.memory import is_out_of_memory, program_bytes
from pgps_jax.train.programs import ProgramError, StagePrograms, enable_compilation_cache, halve_batch, more_parts, stages_from

FOURS = PatchLimits((4, 4, 4), (4, 4, 4))
WAIT = 60  # seconds after which a test that hangs fails instead


def schedule(mode="efficiency", num_steps=30):
    return make_schedule(CurriculumConfig(mode=mode), (8, 8, 8), 2, FOURS, num_steps, 1)


def shape(stage):
    return (stage.batch_size, *stage.patch_size)


def lower(stage):
    def step(state, batch):
        return {"step": state["step"] + 1, "sum": state["sum"] + batch.sum()}

    state = {"step": jax.ShapeDtypeStruct((), jnp.int32), "sum": jax.ShapeDtypeStruct((), jnp.float32)}
    return jax.jit(step, donate_argnums=0).lower(state, jax.ShapeDtypeStruct(shape(stage), jnp.float32))


@pytest.mark.parametrize("mode", ["constant", "efficiency", "performance", "rpss", "reversed"])
def test_over_a_whole_run_each_stage_compiles_exactly_once(mode):
    ours = schedule(mode)
    state = {"step": jnp.int32(0), "sum": jnp.float32(0)}
    with StagePrograms(lower) as programs:
        if mode == "rpss":
            programs.prefetch(*ours.stages)
        for step in range(ours.num_steps):
            stage = ours.stage_at(step)
            program = programs.get(stage)
            if mode != "rpss" and stage.index + 1 < len(ours.stages):
                programs.prefetch(ours.stages[stage.index + 1])
            state = program(state, jnp.ones(shape(stage)))
        assert dict(programs.compilations) == dict.fromkeys(ours.stages, 1)
    assert int(state["step"]) == ours.num_steps
    assert float(state["sum"]) == sum(ours.stage_at(step).voxels for step in range(ours.num_steps))


def test_a_program_refuses_other_shapes_instead_of_compiling_again():
    small, large = schedule().stages[0], schedule().stages[-1]
    with StagePrograms(lower) as programs:
        program = programs.get(small)
        with pytest.raises(TypeError, match="compiled"):
            program({"step": jnp.int32(0), "sum": jnp.float32(0)}, jnp.ones(shape(large)))
        assert programs.compilations == {small: 1}


def test_the_next_program_is_made_in_the_background_while_training_goes_on():
    training_went_on, threads = threading.Event(), []

    def lower_when_allowed(stage):
        threads.append(threading.current_thread())
        assert training_went_on.wait(WAIT)
        return lower(stage)

    stage = schedule().stages[1]
    with StagePrograms(lower_when_allowed) as programs:
        programs.prefetch(stage)  # would wait for ever if it did the work itself
        training_went_on.set()
        programs.get(stage)
        programs.prefetch(stage)
        assert programs.compilations == {stage: 1}
    assert threads and threads[0] is not threading.main_thread()


def test_all_programs_of_random_patch_sizes_are_made_side_by_side():
    together = threading.Barrier(2, timeout=WAIT)

    def lower_in_pairs(stage):
        together.wait()
        return lower(stage)

    stages = schedule().stages[:4]
    with StagePrograms(lower_in_pairs, threads=2) as programs:
        programs.prefetch(*stages)
        for stage in stages:
            programs.get(stage)


def test_a_timing_tells_tracing_compiling_waiting_and_memory_as_a_record():
    stage = schedule().stages[0]
    with StagePrograms(lower) as programs:
        timing = programs.timing(stage)
        program = programs.get(stage)
        assert timing.trace_seconds > 0 and timing.compile_seconds > 0 and not timing.cached
        assert timing.stall_seconds >= timing.trace_seconds + timing.compile_seconds
        assert programs.timing(stage) == timing._replace(stall_seconds=pytest.approx(0, abs=0.1)), "nobody waits twice"
        assert timing.program_bytes == program_bytes(program)
        record = timing.record()
        assert (record["stage"], record["patch_size"], record["batch_size"]) == (0, [4, 4, 4], 2)
        assert record["compile_seconds"] == timing.compile_seconds
        assert str(timing).startswith("stage 0 (4x4x4 batch 2): traced") and "first step" not in str(timing)
        assert str(timing._replace(first_step_seconds=1.5)).endswith(", first step 1.50 s")


def test_a_program_that_was_dropped_is_let_go():
    stage = schedule().stages[0]
    with StagePrograms(lower) as programs:
        first = programs.get(stage)
        programs.drop(stage)
        assert programs.get(stage) is not first and programs.compilations[stage] == 2


def test_programs_that_are_not_kept_are_let_go_and_not_even_begun_where_their_turn_has_not_come():
    begun, go_on = [], threading.Event()

    def lower_slowly(stage):
        begun.append(stage)
        assert go_on.wait(WAIT)
        return lower(stage)

    stages = schedule().stages[:4]
    with StagePrograms(lower_slowly, threads=1) as programs:
        programs.prefetch(*stages)
        programs.keep(stages[:1])
        go_on.set()
        programs.get(stages[0])
        programs.get(stages[3])
    assert begun == [stages[0], stages[3]]


def test_stages_still_in_use_come_in_the_order_of_their_first_use():
    ours = schedule()
    a, b, c = ours.stages[:3]
    drawn = replace(ours, stage_of_step=np.array([0, 2, 1, 2, 1], np.int32), case_pool_of_step=np.ones(5, np.int32))
    assert [stages_from(drawn, step) for step in range(5)] == [[a, c, b], [c, b], [b, c], [c, b], [b]]


def test_an_error_in_the_background_is_raised_by_get_with_the_stage_named_and_can_be_retried():
    stage, failures = schedule().stages[2], [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")]

    def fail_once(stage):
        if failures:
            raise failures.pop()
        return lower(stage)

    with StagePrograms(fail_once) as programs:
        programs.prefetch(stage)
        with pytest.raises(ProgramError, match=r"stage 2 \(8x8x4 batch 2\): .*Out of memory") as caught:
            programs.get(stage)
        assert is_out_of_memory(caught.value)
        programs.get(stage)


def test_compiler_options_reach_the_compiler():
    with StagePrograms(lower, {"xla_no_such_option": True}) as programs, \
            pytest.raises(ProgramError, match="xla_no_such_option"):
        programs.get(schedule().stages[0])


def test_halving_keeps_everything_but_one_batch():
    before = schedule("performance")
    after = halve_batch(before, 0)
    assert after.stages[0].batch_size == before.stages[0].batch_size // 2 == 8
    assert after.stages[1:] == before.stages[1:]
    assert np.array_equal(after.stage_of_step, before.stage_of_step)
    assert halve_batch(before, 0, multiple_of=3).stages[0].batch_size == 6
    with pytest.raises(ValueError, match="2 devices cannot share"):
        halve_batch(before, len(before.stages) - 1, multiple_of=2)


def test_parts_become_smaller_when_memory_does_not_suffice_and_always_divide_the_batch():
    before = schedule("performance")  # a batch of 16 in the first stage
    seen = [before]
    for _ in range(4):
        seen.append(more_parts(seen[-1], 0))
    assert [s.stages[0].parts for s in seen] == [1, 2, 4, 8, 16]
    assert all(s.stages[0].batch_size == 16 and s.stages[1:] == before.stages[1:] for s in seen)
    with pytest.raises(ValueError, match="less than a part"):
        more_parts(seen[-1], 0)
    with pytest.raises(ValueError, match="less than a part"):
        more_parts(seen[2], 0, multiple_of=4)
    smaller = halve_batch(seen[2], 0).stages[0]
    assert (smaller.batch_size, smaller.parts) == (8, 4)


def test_a_run_that_runs_out_of_memory_goes_on_with_half_the_batch_and_its_state():
    """As the loop uses the pieces: the device fails for batches above 4, the optimizer's sum survives."""
    ours = schedule("performance", num_steps=4)
    state = {"step": jnp.int32(0), "sum": jnp.float32(0)}
    with StagePrograms(lower) as programs:
        step = 0
        while step < ours.num_steps:
            stage = ours.stage_at(step)
            try:
                if stage.batch_size > 4:
                    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
                state = programs.get(stage)(state, jnp.ones(shape(stage)))
            except jax.errors.JaxRuntimeError as error:
                assert is_out_of_memory(error)
                ours = halve_batch(ours, stage.index)
                continue
            step += 1
    assert int(state["step"]) == 4 and max(s.batch_size for s in ours.stages) == 4


@pytest.fixture
def cache_config():
    from jax.experimental.compilation_cache import compilation_cache

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_come_from_the_cache_the_second_time(tmp_path, cache_config):
    stage, folder = Stage(0, (4, 4, 12), 2), tmp_path / "user" / "cache"
    assert enable_compilation_cache(folder, 10**9) is None
    assert folder.stat().st_mode & 0o777 == 0o700
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    def cached():
        jax.clear_caches()
        with StagePrograms(lower) as programs:
            programs.get(stage)
            return programs.timing(stage).cached

    assert [cached(), cached()] == [False, True]


def test_programs_unused_for_longest_are_deleted_beyond_the_limit(tmp_path, cache_config):
    tmp_path.chmod(0o700)
    for age, name in enumerate(["new", "middle", "old"]):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert enable_compilation_cache(tmp_path, 250) is None
    assert {p.name for p in tmp_path.iterdir()} == {"new", "middle"}


def test_a_cache_that_others_could_write_is_not_used(tmp_path, cache_config, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert "others may write" in enable_compilation_cache(tmp_path / "open", 10**9)

    (tmp_path / "file").touch()
    assert "not kept" in enable_compilation_cache(tmp_path / "file", 10**9)

    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    assert "is not a folder" in enable_compilation_cache(tmp_path / "link", 10**9)

    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert "belongs to another user" in enable_compilation_cache(tmp_path / "mine", 10**9)
    assert jax.config.jax_compilation_cache_dir != str(tmp_path / "mine")
