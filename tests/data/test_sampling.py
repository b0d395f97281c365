"""Where patches come from: against the rules in words, plain implementations and nnU-Net's own loader."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgps_jax.curriculum import batch_sizes
from pgps_jax.data.dataset import open_dataset, read_case
from pgps_jax.data.plan import read_plan
from pgps_jax.data.preprocess import preprocess_case
from pgps_jax.data.sampling import (
    SamplingConfig,
    crops_per_case,
    cut_crops,
    draw_batch,
    forced_crops,
    place_crops,
    start_bounds,
)
from pgps_jax.data.store import CaseStore, Preprocessed, StoredCase, write_case
from pgps_jax.errors import InputError

PAIRED = SamplingConfig()
PER_CASE = SamplingConfig(scheme="per-case", foreground_fraction=0.33)
LADDER = [(8, 8, 8), (16, 8, 8), (16, 16, 8), (16, 16, 16), (24, 16, 16), (24, 24, 16), (24, 24, 24), (32, 24, 24),
          (32, 32, 24), (32, 32, 32), (40, 32, 32), (40, 40, 32), (40, 40, 40), (40, 48, 40), (40, 56, 40)]  # fmt: skip
sizes = st.tuples(*[st.integers(1, 12)] * 3)


def place(numbers, forced, shape, locations, crop, patch, config=PAIRED):
    numbers = np.asarray(numbers, float)
    return place_crops(numbers, np.broadcast_to(forced, len(numbers)), shape, locations, crop, patch, config)


# Forced or not


@pytest.mark.parametrize(
    ("batch", "fraction", "forced"),
    [(2, 0.33, [0, 1]), (9, 0.33, [0] * 6 + [1] * 3), (9, 0.5, [0] * 4 + [1] * 5), (3, 0.5, [0, 0, 1]), (4, 0.0, [0] * 4)],
)
def test_per_case_forces_the_last_crops_as_nnunet_does(batch, fraction, forced):
    config = SamplingConfig(scheme="per-case", foreground_fraction=fraction)
    assert forced_crops(config, batch, 2, step=0).tolist() == [bool(f) for f in forced]


def test_paired_loads_few_cases_and_alternates_between_them_as_published():
    assert forced_crops(PAIRED, 9, 9, 0).tolist() == [False, True] * 4 + [False]
    assert forced_crops(PAIRED, 10, 9, 0).tolist() == [False, False, True, True] * 2 + [False, False]
    assert forced_crops(PAIRED, 7, 2, 0).tolist() == [False] * 4 + [True] * 3
    batches = batch_sizes("voxel-budget", LADDER, 9)
    shares = [round(float(forced_crops(PAIRED, b, 9, 0).mean()), 4) for b in batches]
    assert shares == [0.4444, 0.4473, 0.4478, 0.449, 0.458, 0.4598, 0.4828, 0.4651, 0.5, 0.5, 0.4737, 0.4667, 0.5, 0.4, 0.4444]
    assert all(-(-b // crops_per_case(PAIRED, b, 9)) <= 9 for b in batches)


def test_batches_of_a_single_case_are_forced_every_second_step():
    for batch in (1, 5):
        patterns = [forced_crops(PAIRED, batch, 1, step) for step in range(6)]
        assert [p.tolist() for p in patterns] == [[bool(step % 2)] * batch for step in range(6)]
    third = [forced_crops(SamplingConfig("per-case", 1 / 3), 1, 1, step)[0] for step in range(300)]
    assert sum(third) == 100


# Cases


def test_cases_are_drawn_with_replacement_in_proportion_to_their_weights():
    rng, weights = np.random.default_rng(0), np.array([1.0, 0.0, 2.0, 1.0])
    batches = [draw_batch(rng, PAIRED, 8, 4, weights, step) for step in range(2000)]
    assert all((batch.case[::2] == batch.case[1::2]).all() for batch in batches)  # two crops of each case
    drawn = np.concatenate([batch.case[::2] for batch in batches])
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    assert np.all(np.abs(shares - [0.25, 0, 0.5, 0.25]) <= 4 * np.sqrt(0.25 / len(drawn)))
    assert shares[1] == 0
    assert any(len(set(batch.case.tolist())) < 4 for batch in batches)


def test_a_batch_depends_on_its_generator_only():
    one, two = (draw_batch(np.random.default_rng(3), PER_CASE, 9, 2, np.ones(5), 0) for _ in range(2))
    other = draw_batch(np.random.default_rng(4), PER_CASE, 9, 2, np.ones(5), 0)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one.numbers, other.numbers)


# Boxes


@given(shape=sizes, patch=sizes, margin=st.tuples(*[st.integers(0, 5)] * 3))
@settings(max_examples=60, deadline=None)
def test_random_crops_reach_every_valid_corner_and_no_other(shape, patch, margin):
    crop = tuple(p + m for p, m in zip(patch, margin, strict=True))
    first, last = start_bounds(shape, crop, patch)
    for axis in range(3):  # nnU-Net's rule, written out
        need = max(margin[axis], crop[axis] - shape[axis])
        assert (first[axis], last[axis]) == (-need // 2, shape[axis] + need // 2 + need % 2 - crop[axis])
    n = int((last - first + 1).max())
    numbers = np.stack([(np.arange(n) + 0.5) / n] * 5, axis=1)
    found = place(numbers, False, shape, {}, crop, patch).start
    assert [set(found[:, a].tolist()) for a in range(3)] == [set(range(first[a], last[a] + 1)) for a in range(3)]
    corners = place([[0.0] * 5, [1 - 2**-53] * 5], False, shape, {}, crop, patch).start
    assert (corners == [first, last]).all()


@given(shape=sizes, patch=sizes, margin=st.tuples(*[st.integers(0, 5)] * 3), jitter=st.sampled_from([0.0, 0.25, 0.5]), data=st.data())
@settings(max_examples=100, deadline=None)
def test_forced_crops_show_their_voxel_and_every_voxel_can_be_chosen(shape, patch, margin, jitter, data):
    crop = tuple(p + m for p, m in zip(patch, margin, strict=True))
    voxels = np.array(list(itertools.product(*map(range, shape))), np.int32)
    config = SamplingConfig(jitter=jitter)
    shifts = np.array(data.draw(st.lists(st.tuples(*[st.floats(0, 1, exclude_max=True)] * 3), min_size=1, max_size=3)))
    for shift in shifts:
        numbers = np.column_stack([np.zeros(len(voxels)), (np.arange(len(voxels)) + 0.5) / len(voxels), np.tile(shift, (len(voxels), 1))])
        placed = place(numbers, True, shape, {1: voxels}, crop, patch, config)
        assert placed.label == [1] * len(voxels)
        assert (placed.start >= start_bounds(shape, crop, patch)[0]).all()
        inside = voxels - placed.start - np.array(crop) // 2 + np.array(patch) // 2  # within the patch that is left of the crop
        clamped = placed.start == start_bounds(shape, crop, patch)[0]
        assert ((inside >= 0) | clamped).all() and (inside < patch).all()
        if not any(margin):
            assert (inside >= 0).all()


def test_forced_crops_are_clamped_below_but_hang_over_the_upper_border():
    voxels = np.array([[0, 10, 19]], np.int32)
    placed = place([[0.5] * 5], True, (20, 20, 20), {1: voxels}, (8, 8, 8), (8, 8, 8))
    assert placed.start.tolist() == [[0, 6, 15]]


def test_jitter_moves_forced_crops_within_its_range_and_reaches_both_ends():
    numbers = np.random.default_rng(0).random((500, 5))
    voxel = np.full((1, 3), 50, np.int32)
    start = place(numbers, True, (100, 100, 100), {1: voxel}, (16, 16, 16), (16, 16, 16), SamplingConfig(jitter=0.25)).start
    for axis in range(3):
        assert set(start[:, axis].tolist()) == set(range(38, 47))
    assert (np.unique(start, axis=0).shape[0]) > 300  # axes move independently


def test_classes_are_chosen_equally_among_those_present_whatever_their_size():
    locations = {1: np.arange(3000, dtype=np.int32).reshape(-1, 3), 2: np.zeros((0, 3), np.int32), (1, 3): np.ones((3, 3), np.int32)}
    numbers = np.random.default_rng(0).random((4000, 5))
    start, labels = place(numbers, True, (9, 9, 9), locations, (4, 4, 4), (4, 4, 4))
    assert set(labels) == {1, (1, 3)}
    assert abs(labels.count(1) / 4000 - 0.5) < 4 * np.sqrt(0.25 / 4000)
    chosen = start[[label == 1 for label in labels], 0] / 3000  # each voxel of a class is as likely as any other
    assert abs(chosen.mean() - 0.5) < 4 * np.sqrt(1 / 12 / len(chosen)) and chosen.min() < 0.01 and chosen.max() > 0.99

    weighted = SamplingConfig(class_weights=(3.0, 5.0, 1.0))
    labels = place(numbers, True, (9, 9, 9), locations, (4, 4, 4), (4, 4, 4), weighted).label
    assert abs(labels.count(1) / 4000 - 0.75) < 4 * np.sqrt(0.1875 / 4000)


def test_without_foreground_forced_crops_are_random_ones():
    numbers = np.random.default_rng(0).random((50, 5))
    empty = {1: np.zeros((0, 3), np.int32)}
    forced, unforced = (place(numbers, f, (20, 9, 9), empty, (4, 4, 4), (4, 4, 4)) for f in (True, False))
    assert np.array_equal(forced.start, unforced.start) and forced.label == [None] * 50


def test_with_ignored_voxels_random_crops_are_centred_on_annotated_ones():
    annotated, foreground = (-1, 0, 1), np.full((1, 3), 11, np.int32)
    rows = np.array([[6, 7, 8], [9, 9, 9]], np.int32)
    numbers = np.random.default_rng(0).random((40, 5))
    forced = np.arange(40) >= 20
    placed = place(numbers, forced, (20, 20, 20), {annotated: rows, 1: foreground}, (4, 4, 4), (4, 4, 4))
    assert placed.label == [annotated] * 20 + [1] * 20
    assert {tuple(s) for s in placed.start[:20].tolist()} == {(4, 5, 6), (7, 7, 7)}
    assert {tuple(s) for s in placed.start[20:].tolist()} == {(9, 9, 9)}

    only_background = place(numbers, True, (20, 20, 20), {annotated: rows, 1: foreground[:0]}, (4, 4, 4), (4, 4, 4))
    assert set(only_background.label) == {annotated}
    nothing = place(numbers, forced, (20, 20, 20), {annotated: rows[:0], 1: foreground[:0]}, (4, 4, 4), (4, 4, 4))
    assert nothing.label == [None] * 40 and len(np.unique(nothing.start, axis=0)) > 30


# Voxels


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 13, 17, 11)).astype(np.float32)
    seg = rng.integers(-1, 4, (1, 13, 17, 11)).astype(np.int16)
    return StoredCase("case", image, seg, {}, {})


OVERLAPPING = [[6 + i % 2, -4 + i % 3, -4 + i % 5] for i in range(30)]


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("starts", [[[0, 0, 0]], [[-3, 2, 5], [-3, 3, 5], [9, 14, 8], [4, 5, 1]], OVERLAPPING])
def test_crops_equal_those_of_a_padded_volume(case, starts, on_disk, tmp_path):
    if on_disk:
        write_case(tmp_path, "case", Preprocessed(case.image, case.seg, {}, {}), (8, 8, 8))
    stored = CaseStore(tmp_path).open("case") if on_disk else case
    pad = ((0, 0), *[(20, 20)] * 3)
    padded, padded_seg = np.pad(case.image, pad), np.pad(case.seg, pad, constant_values=-1)
    size, rows = (6, 9, 7), np.arange(len(starts)) + 2
    image = np.zeros((len(starts) + 3, *size, 2), np.float32)
    label = np.full((len(starts) + 3, *size), -1, np.int8)
    cut_crops(stored, np.array(starts), image, label, rows)
    for row, start in zip(rows, starts, strict=True):
        box = (slice(None), *(slice(s + 20, s + 20 + n) for s, n in zip(start, size, strict=True)))
        assert np.array_equal(image[row], np.moveaxis(padded[box], 0, -1))
        assert np.array_equal(label[row], padded_seg[box][0])
    assert not image[[0, 1, -1]].any() and (label[[0, 1, -1]] == -1).all()


def test_float16_crops_stay_finite(case):
    bright = case._replace(image=case.image * 1e6)
    image, label = np.zeros((1, 6, 6, 6, 2), np.float16), np.full((1, 6, 6, 6), -1, np.int8)
    cut_crops(bright, np.array([[2, 2, 2]]), image, label, np.array([0]))
    assert np.isfinite(image).all() and np.abs(image).max() > 6e4


@pytest.mark.parametrize(
    ("values", "word"),
    [({"foreground_fraction": 1.2}, "foreground-fraction"), ({"jitter": 0.7}, "jitter"), ({"class_weights": (0.0, 0.0)}, "class-weights"),
     ({"class_weights": (1.0, -1.0)}, "class-weights"), ({"case_weights": (("a", float("nan")),)}, "case-weights")],
)
def test_values_out_of_range_are_named(values, word):
    with pytest.raises(InputError, match=word):
        SamplingConfig(**values).check()


# Beside nnU-Net's loader and the published sampler on real cases


class RealCase:
    """Shape, class locations, and number of foreground voxels of any box in constant time (summed-area table)."""

    def __init__(self, preprocessed: Preprocessed):
        seg = preprocessed.seg[0]
        self.shape, self.locations = seg.shape, preprocessed.locations
        self.sums = np.pad((seg > 0).cumsum(0).cumsum(1).cumsum(2), ((1, 0),) * 3)

    def foreground(self, start: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
        """Share of foreground voxels of boxes (n, 3); outside of the case there are none."""
        ends = [np.clip(start, 0, self.shape), np.clip(start + size, 0, self.shape)]
        total = sum(
            (-1) ** (3 - i - j - k) * self.sums[ends[i][:, 0], ends[j][:, 1], ends[k][:, 2]]
            for i, j, k in itertools.product(range(2), repeat=3)
        )
        return total / np.prod(size)


@pytest.fixture(scope="module")
def hippocampus(real_data, real_parity):
    """Training cases of fold 0 as preprocessed by the plan, and the peers' statistics."""
    plan = read_plan(real_parity / "plans/Dataset004_Hippocampus/nnUNetPlans.json")
    train = set(json.loads((real_parity / "plans/Dataset004_Hippocampus/splits_given.json").read_text())[0]["train"])
    dataset = open_dataset(real_data / "Hippocampus")
    configuration = plan.configurations["3d_fullres"]
    raw = [read_case(case, dataset.labels) for case in dataset.cases if case.id in train]
    cases = [RealCase(preprocess_case(r, plan, configuration, dataset.labels)) for r in raw]
    assert len(cases) == len(train)
    return cases, json.loads((real_parity / "sampling/Dataset004_Hippocampus_fold0.json").read_text())


def crops_of(cases, config, want, num_batches, seed):
    """Of each crop: forced, class aimed at, start / case shape, foreground share of its patch, and its case draw."""
    rng, crop, patch = np.random.default_rng(seed), tuple(want["loader_patch_size"]), tuple(want["patch_size"])
    batch, planned = want["batch_size"], want.get("planned_batch_size", want["batch_size"])
    draws = [draw_batch(rng, config, batch, planned, np.ones(len(cases)), step) for step in range(num_batches)]
    drawn, forced, numbers = (np.concatenate(column) for column in zip(*draws, strict=True))
    group = (np.arange(num_batches)[:, None] * batch + np.arange(batch) // crops_per_case(config, batch, planned)).ravel()
    rows = []
    for k in np.unique(drawn):
        mine, case = drawn == k, cases[k]
        placed = place_crops(numbers[mine], forced[mine], case.shape, case.locations, crop, patch, config)
        foreground = case.foreground(placed.start + np.array(crop) // 2 - np.array(patch) // 2, patch)
        label = np.array([label or 0 for label in placed.label])
        rows.append((forced[mine], label, placed.start, placed.start / case.shape, foreground, group[mine]))
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


def mean_and_error(values, groups):
    """Mean and its standard error, values of one group not being independent."""
    deviations = np.bincount(np.unique(groups, return_inverse=True)[1], values - values.mean())
    return values.mean(), np.sqrt((deviations**2).sum()) / len(values)


def test_starts_and_classes_are_distributed_as_in_nnunets_loader(hippocampus):
    cases, peers = hippocampus
    for number, want in enumerate(peers["stock_loader"]):
        config = SamplingConfig("per-case", want["oversample"])
        forced, label, start, relative, _, _ = crops_of(cases, config, want, 2000 // want["batch_size"], seed=number)
        by_position = forced_crops(config, want["batch_size"], want["batch_size"], 0)
        assert by_position.tolist() == [f == 1 for f in want["forced_by_position_in_batch"]]
        assert forced.mean() == pytest.approx(want["forced_share"])
        for value, share in want["class_share_among_forced"].items():
            error = np.hypot(share["se"], np.sqrt(0.25 / forced.sum()))
            assert abs((label[forced] == int(value)).mean() - share["share"]) <= 4 * error
        for kind, rows in (("forced", forced), ("random", ~forced)):
            there, n = want[kind], rows.sum()
            error = np.array(there["lower_bound_std"]) * np.sqrt(1 / n + 1 / there["n"])
            assert np.all(np.abs(start[rows].mean(0) - there["lower_bound_mean"]) <= 4 * error)
            error = relative[rows].std(0) * np.sqrt(1 / n + 1 / there["n"])
            assert np.all(np.abs(relative[rows].mean(0) - there["lower_bound_over_image_size_mean"]) <= 4 * error)
            for axis, quantiles in enumerate(there["lower_bound_quantiles_per_axis"]):
                inner = {float(q): value for q, value in quantiles.items() if 0 < float(q) < 1}
                ours = np.quantile(start[rows, axis], list(inner))
                assert np.all(np.abs(ours - list(inner.values())) <= 2), (number, kind, axis)


def test_foreground_in_patches_is_as_published_at_every_stage(hippocampus):
    cases, peers = hippocampus
    compared = apart = 0
    for mode in ("v2_performance", "v2_efficiency"):
        for number, want in enumerate(peers[mode]):
            batches = min(want["batches"], 100)
            forced, label, _, _, foreground, group = crops_of(cases, PAIRED, want, batches, seed=number)
            assert forced.mean() == pytest.approx(want["forced_share"])
            share = want["class_share_among_forced"]["1"]
            error = np.hypot(share["se"], np.sqrt(0.25 / forced.sum()))
            assert abs((label[forced] == 1).mean() - share["share"]) <= 4 * error
            for name, rows in (("", forced | True), ("_forced", forced), ("_random", ~forced)):
                there = want[f"foreground_fraction{name}"]
                mean, error = mean_and_error(foreground[rows], group[rows])
                assert abs(mean - there["mean"]) <= 4 * np.hypot(error, there["se"]), (mode, want["patch_size"], name)
                low, high = there["ci95"]
                compared += 1
                apart += not (mean - 1.96 * error <= high and low <= mean + 1.96 * error)
    assert compared == 90 and apart <= 3  # intervals of equal width miss each other in 0.6 % of fair comparisons
