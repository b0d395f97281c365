"""The curriculum: the published stage tables, and what must hold for every plan."""

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgps_jax.architecture import PatchLimits
from pgps_jax.curriculum import (
    CurriculumConfig,
    Schedule,
    Stage,
    all_stages,
    make_schedule,
    parts_at_least,
    patch_ladder,
    schedule_from_json,
    schedule_to_json,
    with_batch_sizes,
)
from pgps_jax.errors import InputError

EIGHTS = PatchLimits((8, 8, 8), (8, 8, 8))
HIPPOCAMPUS = dict(patch_size=(40, 56, 40), batch_size=9, limits=EIGHTS)
MODE_OF_KEY = {
    "v1_pgps": "pgps", "v1_pgps_plus": "pgps-plus", "v2_efficiency": "efficiency", "v2_performance": "performance",
}
GROWING = ["constant", *MODE_OF_KEY.values()]
MODES = [*GROWING, "rpss", "reversed", "random-order"]


def schedule(mode="efficiency", num_steps=1000, steps_per_epoch=1, plan=HIPPOCAMPUS, **config):
    config = CurriculumConfig(mode=mode, **config)
    return make_schedule(config, **plan, num_steps=num_steps, steps_per_epoch=steps_per_epoch)


def table(schedule, steps_per_epoch=1):
    epochs = [(s, first // steps_per_epoch, n // steps_per_epoch) for s, first, n in schedule.runs()]
    return [(s.patch_size, s.batch_size, first, n) for s, first, n in epochs]


def golden_plan(plan):
    increment = tuple(2**n for n in plan["num_pool_per_axis"])
    return dict(patch_size=tuple(plan["planned_patch_size"]), batch_size=plan["planned_batch_size"],
                limits=PatchLimits(increment, increment))


def published(plan, key):
    return [(tuple(s["patch_size"]), s["batch_size"], s["first_epoch"], s["num_epochs"]) for s in plan[key]["stages"]]


# The published trainers


@pytest.mark.parametrize("key", MODE_OF_KEY)
def test_every_sound_published_stage_table_is_met_exactly(golden, key):
    plans = [p for p in golden("curriculum")[1]["plans"] if not p["quirk"]]
    assert len(plans) >= 10
    for plan in plans:
        ours = schedule(MODE_OF_KEY[key], plan["num_epochs"] * 250, 250, golden_plan(plan))
        assert table(ours, 250) == published(plan, key), plan["name"]


def test_random_patch_sizes_come_from_the_published_pool_with_equal_chances(golden):
    for plan in (p for p in golden("curriculum")[1]["plans"] if not p["quirk"]):
        ours = schedule("rpss", 20_000, 250, golden_plan(plan))
        pool = {tuple(p) for p in plan["v1_rpss"]["drawn_uniformly_each_iteration"]}
        assert {s.patch_size for s in ours.stages} == pool and len(ours.stages) == len(pool)
        assert {s.batch_size for s in ours.stages} == {plan["planned_batch_size"]}
        expected = 20_000 / len(pool)
        deviation = np.bincount(ours.stage_of_step, minlength=len(pool)) - expected
        assert np.abs(deviation).max() < 5 * math.sqrt(expected)


@pytest.mark.parametrize("key", MODE_OF_KEY)
def test_where_the_published_planner_leaves_the_plan_ours_stays_within(golden, key):
    quirks = {p["name"]: p for p in golden("curriculum")[1]["plans"] if p["quirk"]}
    mode = MODE_OF_KEY[key]

    with pytest.raises(InputError, match="42 along axis d cannot be reached; the network takes 8"):
        schedule(mode, plan=golden_plan(quirks["not_a_multiple"]))

    # axis 0 cannot grow: theirs overshoots there, and otherwise walks through the same patches
    plan = quirks["edge_equals_increment"]
    ours = schedule(mode, plan=golden_plan(plan))
    theirs = [p for p, _ in itertools.groupby((8, *p[1:]) for p, *_ in published(plan, key))]
    assert [s.patch_size for s in ours.stages] == (theirs[1:] if mode.startswith("pgps") else theirs)

    ours = schedule(mode, 10, plan=golden_plan(quirks["fewer_epochs_than_stages"]))
    assert [n for *_, n in table(ours)] == [1] * 10
    assert ours.stages[-1].patch_size == (40, 56, 40)

    plan = quirks["batch1"]
    ours = table(schedule(mode, 200, plan=golden_plan(plan)))
    theirs = published(plan, key)
    if mode == "pgps-plus":  # theirs starts its chain from 2 patches whatever was planned, and switches once too often
        assert ours[-1] == ((64, 64, 64), 1, 176, 24) and [r[0] for r in ours] == [r[0] for r in theirs[:-1]]
    else:
        assert ours == theirs

    plan = quirks["epochs_equal_stages_v2"]
    assert table(schedule(mode, 15, plan=golden_plan(plan))) == published(plan, key)


# What must hold for every plan

sizes = st.tuples(*[st.integers(1, 9)] * 3)


@st.composite
def plans(draw):
    """Any plan: anisotropic, 2D, odd strides, edges equal to the smallest, batch 1."""
    increment = draw(sizes)
    smallest = tuple(i * n for i, n in zip(increment, draw(st.tuples(*[st.integers(1, 2)] * 3)), strict=True))
    growth = draw(st.tuples(*[st.integers(0, 5)] * 3))
    patch = tuple(s + g * i for s, g, i in zip(smallest, growth, increment, strict=True))
    if draw(st.booleans()):
        smallest, increment, patch = (1, *smallest[1:]), (1, *increment[1:]), (1, *patch[1:])
    return dict(patch_size=patch, batch_size=draw(st.integers(1, 12)), limits=PatchLimits(smallest, increment))


anything = dict(plan=plans(), num_steps=st.integers(1, 3000), steps_per_epoch=st.integers(1, 300),
                pacing=st.sampled_from(["uniform", "volume", "equal-time"]))


@settings(deadline=None)
@given(mode=st.sampled_from(MODES), **anything)
def test_every_patch_is_one_the_network_takes_and_within_the_plan(mode, plan, num_steps, steps_per_epoch, pacing):
    ours = schedule(mode, num_steps, steps_per_epoch, plan, pacing=pacing)
    smallest, increment = plan["limits"]
    for stage in ours.stages:
        for edge, planned, s, i in zip(stage.patch_size, plan["patch_size"], smallest, increment, strict=True):
            assert s <= edge <= planned and (edge - s) % i == 0
        assert stage.batch_size >= 1
    assert plan["patch_size"] in [s.patch_size for s in ours.stages]
    assert [s.index for s in ours.stages] == list(range(len(ours.stages)))


@settings(deadline=None)
@given(mode=st.sampled_from(MODES), **anything)
def test_steps_add_up_and_the_same_question_gets_the_same_answer(mode, plan, num_steps, steps_per_epoch, pacing):
    ours = schedule(mode, num_steps, steps_per_epoch, plan, pacing=pacing)
    assert ours.num_steps == sum(n for *_, n in ours.runs()) == num_steps == len(ours.case_pool_of_step)
    again = schedule(mode, num_steps, steps_per_epoch, plan, pacing=pacing)
    assert schedule_to_json(ours) == schedule_to_json(again)


@settings(deadline=None)
@given(mode=st.sampled_from(GROWING), **anything)
def test_growing_modes_grow_in_single_increments_and_end_at_the_planned_patch(
    mode, plan, num_steps, steps_per_epoch, pacing
):
    ours = schedule(mode, num_steps, steps_per_epoch, plan, pacing=pacing)
    volumes = [math.prod(s.patch_size) for s in ours.stages]
    assert volumes == sorted(volumes) and (np.diff(ours.stage_of_step) >= 0).all()
    assert set(ours.stage_of_step) == set(range(len(ours.stages)))
    assert ours.stage_at(num_steps - 1).patch_size == plan["patch_size"]
    if mode != "constant":
        ladder = patch_ladder(mode, plan["patch_size"], plan["limits"])
        for a, b in itertools.pairwise(ladder):
            grown = [(y - x, i) for x, y, i in zip(a, b, plan["limits"].increment, strict=True) if x != y]
            assert len(grown) == 1 and grown[0][0] == grown[0][1]


@settings(deadline=None)
@given(mode=st.sampled_from(GROWING), **anything)
def test_stages_change_at_whole_epochs_if_there_is_one(mode, plan, num_steps, steps_per_epoch, pacing):
    firsts = [first for _, first, _ in schedule(mode, num_steps, steps_per_epoch, plan, pacing=pacing).runs()]
    if num_steps >= steps_per_epoch:
        assert all(first % steps_per_epoch == 0 for first in firsts)


@settings(deadline=None)
@given(**anything)
def test_performance_fills_the_voxel_budget_and_never_exceeds_it(plan, num_steps, steps_per_epoch, pacing):
    budget = plan["batch_size"] * math.prod(plan["patch_size"])
    for stage in schedule("performance", num_steps, steps_per_epoch, plan, pacing=pacing).stages:
        assert stage.voxels <= budget < stage.voxels + math.prod(stage.patch_size)


@settings(deadline=None)
@given(mode=st.sampled_from(MODES), **anything)
def test_a_schedule_is_read_back_exactly(mode, plan, num_steps, steps_per_epoch, pacing):
    ours = schedule(mode, num_steps, steps_per_epoch, plan, pacing=pacing)
    back = schedule_from_json(schedule_to_json(ours))
    assert back.stages == ours.stages
    for name in ("stage_of_step", "case_pool_of_step"):
        assert np.array_equal(getattr(back, name), getattr(ours, name))
        assert getattr(back, name).dtype == np.int32


# Single cases


def test_the_json_of_a_long_staircase_is_short():
    text = schedule_to_json(schedule(num_steps=250_000, steps_per_epoch=250))["stage_of_step"]
    assert text.startswith("0x16500 1x16500") and len(text) < 200


@pytest.mark.parametrize("broken", [
    {},
    {"stages": [{"patch_size": [8, 8], "batch_size": 1}], "stage_of_step": "0x3", "case_pool_of_step": "1x3"},
    {"stages": [{"patch_size": [8, 8, 8], "batch_size": 1}], "stage_of_step": "0x3", "case_pool_of_step": "1x4"},
    {"stages": [{"patch_size": [8, 8, 8], "batch_size": 1}], "stage_of_step": "0 1", "case_pool_of_step": "1x2"},
    {"stages": [{"patch_size": [8, 8, 8], "batch_size": 1}], "stage_of_step": "zero", "case_pool_of_step": "1"},
    {"stages": [], "stage_of_step": "", "case_pool_of_step": ""},
    {"stages": [{"patch_size": [8, 8, 8], "batch_size": 1}], "stage_of_step": "0x3", "case_pool_of_step": "0x2 1"},
    {"stages": [{"patch_size": [8, 8, 8], "batch_size": 1}], "stage_of_step": "0x3", "case_pool_of_step": "-1x3"},
])
def test_a_file_that_is_no_schedule_is_refused(broken):
    with pytest.raises(InputError, match=r"schedule\.json"):
        schedule_from_json(broken)


def test_controls_spend_the_same_steps_on_each_patch_as_efficiency_in_another_order():
    def steps_of_patch(s):
        return {stage.patch_size: n for stage, _, n in s.runs()}

    growing, backwards, shuffled = (schedule(mode) for mode in ("efficiency", "reversed", "random-order"))
    assert steps_of_patch(growing) == steps_of_patch(backwards) == steps_of_patch(shuffled)
    order = [s.patch_size for s in growing.stages]
    assert [s.patch_size for s in backwards.stages] == order[::-1]
    assert [s.patch_size for s in shuffled.stages] not in (order, order[::-1])
    other_seed = schedule("random-order", schedule_seed=1)
    assert [s.patch_size for s in other_seed.stages] != [s.patch_size for s in shuffled.stages]


def test_pacing_by_volume_and_by_time_weighs_steps_accordingly():
    by_volume = np.array([n for *_, n in schedule(pacing="volume", num_steps=100_000).runs()])
    volumes = np.array([math.prod(s.patch_size) for s in schedule().stages])
    assert np.allclose(by_volume, volumes / volumes.sum() * 100_000, atol=len(volumes))

    seconds = np.linspace(1, 5, 15)
    timed = make_schedule(CurriculumConfig(pacing="equal-time"), **HIPPOCAMPUS, num_steps=100_000, steps_per_epoch=1,
                          seconds_per_step=seconds.tolist())
    spent = np.array([n for *_, n in timed.runs()]) * seconds
    assert np.allclose(spent, spent.mean(), rtol=0.01)

    with pytest.raises(ValueError, match="need 15 positive seconds"):
        make_schedule(CurriculumConfig(pacing="equal-time"), **HIPPOCAMPUS, num_steps=100, steps_per_epoch=1,
                      seconds_per_step=[1.0])


def test_the_batch_policy_can_be_chosen_apart_from_the_mode():
    assert [s.batch_size for s in schedule("pgps", batch_policy="voxel-budget").stages][-1] == 9
    assert {s.batch_size for s in schedule("performance", batch_policy="planned").stages} == {9}
    assert schedule("efficiency", batch_policy="device-memory").stages == schedule("performance").stages
    other = with_batch_sizes(schedule(), range(15, 0, -1))
    assert [s.batch_size for s in other.stages] == list(range(15, 0, -1))
    assert np.array_equal(other.stage_of_step, schedule().stage_of_step)


def test_the_case_pool_grows_as_told_and_ends_with_all_cases():
    def pool(**config):
        return make_schedule(CurriculumConfig(case_epochs=10, case_share=0.25, **config), **HIPPOCAMPUS, num_steps=500,
                             steps_per_epoch=10, num_cases=10).case_pool_of_step.reshape(50, 10)

    assert (pool() == 10).all()
    growing = pool(case_curriculum="pdl")
    assert (growing == growing[:, :1]).all()
    assert growing[[0, 9, 10, 20, 29, 30, 49], 0].tolist() == [3, 3, 6, 9, 9, 10, 10]
    assert pool(case_curriculum="pdl-two-stage")[[0, 9, 10, 49], 0].tolist() == [3, 3, 10, 10]


def pools(cases, epochs, steps_per_epoch=10, num_steps=None, **config):
    whole = epochs * steps_per_epoch
    return make_schedule(CurriculumConfig(**config), **HIPPOCAMPUS, num_steps=num_steps or whole, steps_per_epoch=steps_per_epoch,
                         num_cases=cases, whole_steps=whole).case_pool_of_step


@settings(deadline=None)
@given(cases=st.integers(1, 300), share=st.floats(0.01, 1), case_epochs=st.integers(1, 20), steps_per_epoch=st.integers(1, 20),
       curriculum=st.sampled_from(["pdl", "pdl-two-stage"]), fewer=st.integers(1, 50))
def test_epochs_too_few_for_all_cases_are_refused_naming_those_that_do(cases, share, case_epochs, steps_per_epoch, curriculum, fewer):
    asked = dict(case_curriculum=curriculum, case_share=share, case_epochs=case_epochs)
    try:
        pools(cases, 1, steps_per_epoch, **asked)
        enough = 1
    except InputError as error:
        enough = int(re.search(r"--epochs (\d+) or more", str(error))[1])
        with pytest.raises(InputError, match="--case-curriculum"):
            pools(cases, enough - 1, steps_per_epoch, **asked)
    pool = pools(cases, enough, steps_per_epoch, **asked)
    assert pool[-1] == cases and (np.diff(pool) >= 0).all()
    short = pools(cases, enough, steps_per_epoch, max(1, len(pool) // fewer), **asked)  # as a time budget would have it
    assert short[-1] == cases and set(short) <= set(pool)


def test_stages_that_a_machine_had_a_say_in_keep_their_batches_in_every_order():
    mine = tuple(replace(stage, batch_size=4 + stage.index, parts=2) for stage in all_stages(CurriculumConfig(), (40, 56, 40), 9, EIGHTS))
    of_patch = {stage.patch_size: (stage.batch_size, stage.parts) for stage in mine}
    for mode, epochs in (("efficiency", 1000), ("efficiency", 4), ("reversed", 4), ("random-order", 1000)):
        ours = make_schedule(CurriculumConfig(mode=mode), **HIPPOCAMPUS, num_steps=epochs, steps_per_epoch=1, stages=mine)
        assert all((stage.batch_size, stage.parts) == of_patch[stage.patch_size] for stage in ours.stages)
        assert [stage.index for stage in ours.stages] == list(range(len(ours.stages)))


@pytest.mark.parametrize(("change", "message"), [
    (dict(plan=HIPPOCAMPUS | {"patch_size": (40, 52, 40)}), "40x52x40: edge 52 along axis h"),
    (dict(plan=HIPPOCAMPUS | {"patch_size": (40, 56, 4)}), "40x56x4: edge 4 along axis w"),
    (dict(plan=HIPPOCAMPUS | {"batch_size": 0}), "batch size must be at least 1"),
    (dict(num_steps=0), "number of steps must be at least 1"),
    (dict(case_share=0.0), "--case-share 0.0: must be above 0"),
    (dict(schedule_seed=-1, mode="rpss"), "--schedule-seed -1: must be at least 0"),
])
def test_bad_input_is_refused_in_a_sentence(change, message):
    with pytest.raises(InputError, match=message):
        schedule(**change)


def test_a_stage_is_the_key_of_a_program():
    assert len({Stage(0, (8, 8, 8), 2), Stage(0, (8, 8, 8), 2), Stage(0, (8, 8, 8), 1)}) == 2
    assert Stage(0, (8, 16, 8), 2).voxels == 2048 and str(Stage(0, (8, 16, 8), 2)) == "8x16x8 batch 2"


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 8))
def test_parts_of_a_batch_are_equal_the_fewest_that_suffice_and_shared_by_the_devices(batch, wanted, devices):
    batch *= devices
    parts = parts_at_least(batch, wanted, devices)
    assert batch % parts == 0 and (batch // parts) % devices == 0
    possible = [n for n in range(1, batch // devices + 1) if (batch // devices) % n == 0]
    assert parts == next((n for n in possible if n >= wanted), possible[-1])


def test_stages_computed_in_parts_are_read_back_and_say_so():
    stage = Stage(0, (8, 16, 8), 6, 3)
    back = schedule_from_json(schedule_to_json(Schedule((stage,), np.zeros(4, np.int32), np.ones(4, np.int32))))
    assert back.stages == (stage,) and str(stage) == "8x16x8 batch 6 in 3 parts"
    broken = schedule_to_json(back)
    broken["stages"][0]["parts"] = 4
    with pytest.raises(InputError, match="6 cannot be computed in 4 parts"):
        schedule_from_json(broken)
