"""Batches by their number: the same bits in any layout, bounded memory, and failures that speak."""

import multiprocessing
import os
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from pgps_jax.curriculum import Schedule, Stage
from pgps_jax.data import pipeline
from pgps_jax.data.pipeline import PatchSource, PatchStream, stream, validation_source
from pgps_jax.data.sampling import SamplingConfig
from pgps_jax.data.store import CaseStore, Preprocessed, StoredCase, write_case
from pgps_jax.errors import InputError

IDS = ("a", "b", "c", "d", "e")
STAGES = (Stage(0, (4, 4, 4), 12), Stage(1, (8, 8, 4), 4))
CROPS = ((5, 5, 4), (10, 9, 4))
NUM_STEPS = 12


def make_schedule(pool=5) -> Schedule:
    return Schedule(STAGES, np.repeat(np.arange(2, dtype=np.int32), 6), np.full(NUM_STEPS, pool, np.int32))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> CaseStore:
    folder = tmp_path_factory.mktemp("cases")
    rng = np.random.default_rng(0)
    for number, name in enumerate(IDS):
        shape = tuple(rng.integers(6, 20, 3))
        seg = rng.integers(-1, 3, (1, *shape)).astype(np.int16)
        locations = {k: np.argwhere(seg[0] == k).astype(np.int32) for k in (1, 2)}
        image = np.stack([np.full(shape, 10 + number), rng.normal(size=shape)]).astype(np.float32)
        write_case(folder, name, Preprocessed(image, seg, {}, locations), (8, 8, 4))
    return CaseStore(folder)


@dataclass(frozen=True)
class WatchedStore(CaseStore):
    """Counts and delays what is opened."""

    opened: list = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def open(self, case_id: str) -> StoredCase:
        self.gate.wait(20)
        self.opened.append(case_id)
        return super().open(case_id)


def make_source(store, schedule=None, sampling=SamplingConfig(), seed=0, **options) -> PatchSource:  # noqa: B008 (frozen)
    options = {"cache_bytes": 0} | options
    return PatchSource(store, IDS, schedule or make_schedule(), sampling, CROPS, 4, seed=seed, **options)


def same(one, two) -> bool:
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, two, strict=True))


# What a batch is


def test_a_batch_depends_on_seed_and_step_only(store):
    source = make_source(store)
    forward = [source.batch_of_step(step) for step in range(NUM_STEPS)]
    fresh = make_source(store)
    assert all(same(fresh.batch_of_step(step), forward[step]) for step in reversed(range(NUM_STEPS)))
    assert not any(same(forward[a], forward[a + 1]) for a in (0, 1, 7))
    assert not same(make_source(store, seed=1).batch_of_step(3), forward[3])
    assert not same(make_source(store, purpose="validation").batch_of_step(3), forward[3])


def test_batches_have_the_crop_of_their_stage_channels_last(store):
    for step, (b, crop) in ((0, (12, CROPS[0])), (6, (4, CROPS[1]))):
        image, label = make_source(store).batch_of_step(step)
        assert image.shape == (b, *crop, 2) and image.dtype == np.float32
        assert label.shape == (b, *crop) and label.dtype == np.int16
        inside = image[..., 0] != 0
        assert (label[~inside] == -1).all() and set(np.unique(image[..., 0])) <= {0, 10, 11, 12, 13, 14}


def test_a_batch_is_cut_from_the_cases_that_are_told_and_no_others(store):
    source = make_source(store)
    for step in range(NUM_STEPS):
        numbers = set(np.unique(source.batch_of_step(step).image[..., 0]).astype(int)) - {0}
        assert {IDS[n - 10] for n in numbers} == set(source.cases_of_step(step))


def test_only_ranked_cases_within_the_pool_are_used(store):
    schedule = make_schedule(pool=2)
    used = {case for step in range(NUM_STEPS) for case in make_source(store, schedule).cases_of_step(step)}
    assert used == {"a", "b"}
    weighted = SamplingConfig(case_weights=(("a", 0.0),))
    assert {case for step in range(NUM_STEPS) for case in make_source(store, schedule, weighted).cases_of_step(step)} == {"b"}


def test_light_types_hold_the_same_patches(store):
    image, label = make_source(store).batch_of_step(7)
    light = make_source(store, image_dtype=np.float16, label_dtype=np.int8).batch_of_step(7)
    assert light.image.dtype == np.float16 and np.array_equal(light.image, image.astype(np.float16))
    assert light.label.dtype == np.int8 and np.array_equal(light.label, label)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_made_by_several_processes_make_the_batch(store, parts):
    whole = make_source(store)
    shares = [make_source(store, share=(i, parts)) for i in range(parts)]
    for step in (2, 8):
        joined = [np.concatenate(arrays) for arrays in zip(*[s.batch_of_step(step) for s in shares], strict=True)]
        assert same(joined, whole.batch_of_step(step))


def test_validation_batches_have_the_planned_patch_and_go_by_their_number(store):
    few, many = (validation_source(store, IDS, STAGES[1], SamplingConfig(), seed=0, num_batches=n) for n in (4, 9))
    one = few.batch_of_step(3)
    assert one.image.shape == (4, 8, 8, 4, 2) and one.label.shape == (4, 8, 8, 4)
    assert same(many.batch_of_step(3), one) and not same(many.batch_of_step(4), one)


# Streams


@pytest.mark.parametrize("options", [{"threads": 1, "ahead": 1}, {"threads": 4}, {"threads": 2, "ahead": 20}])
def test_any_number_of_threads_gives_the_same_bits_in_order(store, options):
    expected = [make_source(store).batch_of_step(step) for step in range(NUM_STEPS)]
    with PatchStream(make_source(store), **options) as batches:
        assert all(same(a, b) for a, b in zip(batches, expected, strict=True))


def test_a_stream_goes_on_from_any_step_and_ends_with_the_schedule(store):
    args = (store, IDS, make_schedule(), SamplingConfig(), CROPS, 4)
    with stream(*args, seed=0) as whole, stream(*args, seed=0, first_step=5) as rest:
        late = list(whole)[5:]
        assert rest.step == 5
        assert all(same(a, b) for a, b in zip(rest, late, strict=True))
        assert rest.step == NUM_STEPS
        with pytest.raises(StopIteration):
            next(rest)
    with stream(*args, seed=0, first_step=NUM_STEPS) as nothing:
        assert list(nothing) == []


def test_a_stream_can_end_sooner_and_reads_no_further(store, monkeypatch):
    source, read = make_source(store), []
    whole = source.batch_of_step
    monkeypatch.setattr(source, "batch_of_step", lambda step: read.append(int(step)) or whole(step))
    for stop, expected in ((5, [2, 3, 4]), (2, []), (NUM_STEPS + 9, list(range(2, NUM_STEPS)))):
        read.clear()
        with PatchStream(source, 2, stop=stop, threads=3) as batches:
            assert len(list(batches)) == len(expected)
        assert sorted(read) == expected


def test_processes_give_the_same_bits_and_report_what_goes_wrong(store):
    expected = [make_source(store).batch_of_step(step) for step in range(NUM_STEPS)]
    with PatchStream(make_source(store), processes=1, threads=1) as batches:
        found = [batch for batch, _ in zip(batches, range(6), strict=False)]
        assert all(same(a, b) for a, b in zip(found, expected, strict=False))
        assert all(type(array) is np.ndarray and array.base is None for batch in found for array in batch)
        for worker in multiprocessing.active_children():
            if worker.name.startswith("grain"):
                worker.kill()
        with pytest.raises(RuntimeError, match=r"step \d+ .*Worker process"):
            list(batches)


def test_the_first_batches_of_a_stage_are_read_before_the_last_one_ends(store):
    watched = WatchedStore(store.folder)
    watched.gate.set()
    source, asked = make_source(watched), []
    original = source.batch_of_step
    source.batch_of_step = lambda step: (asked.append(step), original(step))[1]
    with PatchStream(source, 3, threads=1, ahead=4) as batches:
        next(batches)
        for _ in range(100):
            if 7 in asked:
                break
            threading.Event().wait(0.05)
        assert sorted(asked) == [3, 4, 5, 6, 7]  # 6 is the first step of the second stage; no more than 4 ahead


def test_waiting_is_measured_and_long_waits_are_told_with_step_and_cases(store):
    watched = WatchedStore(store.folder)
    watched.gate.set()
    source = make_source(watched)
    watched.gate.clear()
    said, when = [], []

    def say(message: str) -> None:
        said.append(message)
        when.append(time.perf_counter())
        if len(said) == 2:
            watched.gate.set()

    with PatchStream(source, 2, stall_seconds=0.2, say=say) as batches:
        batch = next(batches)
        waited = batches.waited_seconds
        next(batches)
    assert same(batch, make_source(store).batch_of_step(2))
    assert waited >= 0.4 and batches.waited_seconds < waited / 2
    assert when[1] - when[0] > 0.1
    assert "step 2" in said[0] and all(case in said[0] for case in source.cases_of_step(2)[:4])


# Failures


@pytest.mark.parametrize(("threads", "processes"), [(1, 0), (3, 0), (2, 1)])
def test_an_unreadable_case_is_reported_with_case_step_and_cause(store, tmp_path, threads, processes):
    for path in store.folder.rglob("*.*"):
        target = tmp_path / path.relative_to(store.folder)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / "c.b2nd").write_bytes(b"no volume")
    source = make_source(CaseStore(tmp_path))
    first = next(step for step in range(NUM_STEPS) if "c" in source.cases_of_step(step))
    with PatchStream(source, threads=threads, processes=processes) as batches:
        with pytest.raises(InputError, match=rf"[Ss]tep {first}\b.*case c\b.*c\.b2nd is missing or damaged") as report:
            list(batches)
        assert batches.step == first
        assert processes or report.value.__cause__ is not None  # of an error that crosses processes only the text remains


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(case_ids=()), "no cases"),
        (dict(seed=-1), "seed"),
        (dict(share=(0, 5)), "cannot be divided among 5"),
        (dict(sampling=SamplingConfig(class_weights=(1.0,))), "1 values, but there are 2"),
        (dict(sampling=SamplingConfig(case_weights=tuple((name, 0.0) for name in IDS))), "exclude every case"),
        (dict(sampling=SamplingConfig(case_weights=(("a", 1.0), ("zebra", 2.0)))), "names zebra, which"),
        (dict(sampling=SamplingConfig(jitter=2.0)), "jitter"),
    ],
)
def test_values_that_do_not_fit_are_refused_before_anything_is_read(store, options, message):
    values = dict(store=store, case_ids=IDS, schedule=make_schedule(), sampling=SamplingConfig(), crop_sizes=CROPS,
                  planned_batch_size=4, seed=0) | options  # fmt: skip
    with pytest.raises(InputError, match=message):
        PatchSource(**values)


# Memory


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_stays_flat(store):
    stages = tuple(Stage(i, stage.patch_size, 2) for i, stage in enumerate(STAGES))
    schedule = Schedule(stages, np.tile(np.arange(2, dtype=np.int32), 1000), np.full(2000, len(IDS), np.int32))
    with PatchStream(make_source(store, schedule)) as batches:
        sizes = [resident_bytes() for _ in batches]
    assert len(sizes) == 2000
    assert max(sizes[1000:]) - max(sizes[:1000]) < 4 * 1024**2


def test_open_cases_are_bounded_and_the_oldest_is_closed(store, monkeypatch):
    monkeypatch.setattr(pipeline, "_OPEN_BYTES", 1)  # room for one
    watched = WatchedStore(store.folder)
    watched.gate.set()
    source = make_source(watched)
    batches = [source.batch_of_step(step) for step in range(NUM_STEPS)]
    assert len(source._cases._open) == 1
    assert len(watched.opened) > len(IDS)
    assert all(same(batch, make_source(store).batch_of_step(step)) for step, batch in enumerate(batches))


def test_cases_are_kept_in_memory_up_to_the_limit_with_the_same_bits(store):
    expected = [make_source(store).batch_of_step(step) for step in range(NUM_STEPS)]
    sizes = [store.open(name).image.nbytes + store.open(name).seg.nbytes for name in IDS]
    too_little_for_two = sizes[0] + min(sizes[1:]) - 1  # the first case is opened first, by the source's checks
    for room, kept in ((sum(sizes), set(IDS)), (too_little_for_two, {IDS[0]})):
        watched = WatchedStore(store.folder)
        watched.gate.set()
        source = make_source(watched, cache_bytes=room)
        with PatchStream(source, threads=3) as batches:
            assert all(same(a, b) for a, b in zip(batches, expected, strict=True))
        assert set(source._cases._cached) == kept
        assert all(isinstance(opened._case.image, np.ndarray) for opened in source._cases._cached.values())


# A folder that is out of reach


def test_reading_waits_for_a_folder_that_is_gone_and_goes_on_when_it_is_back(store, tmp_path, monkeypatch):
    folder = tmp_path / "cases"
    shutil.copytree(store.folder, folder)
    source = make_source(CaseStore(folder))
    expected = source.batch_of_step(3)
    source, waits = make_source(CaseStore(folder)), []
    folder.rename(tmp_path / "away")

    def back_after_three(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            (tmp_path / "away").rename(folder)

    monkeypatch.setattr(pipeline.time, "sleep", back_after_three)
    assert same(source.batch_of_step(3), expected)
    assert waits == [1.0, 2.0, 5.0]


def test_a_folder_that_stays_away_is_told_in_the_end_and_a_missing_case_at_once(store, tmp_path, monkeypatch):
    folder, waits = tmp_path / "cases", []
    shutil.copytree(store.folder, folder)
    monkeypatch.setattr(pipeline.time, "sleep", waits.append)
    source = make_source(CaseStore(folder))
    name = source.cases_of_step(3)[-1]  # the first was opened to learn the channels
    for path in folder.rglob(f"{name}*"):
        path.unlink()
    with pytest.raises(InputError, match=f"Step 3, stage 0: no patch of 5x5x4 can be cut from case {name} in .*of memory are free"):
        source.batch_of_step(3)
    assert not waits
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="can be cut"):
        source.batch_of_step(3)
    assert 600 < sum(waits) < 1200
