"""From stored cases and a schedule to a stream of batches, read ahead by threads or processes.

Batch n is a pure function of (seed, n): `PatchSource.batch_of_step`. One grain pipeline maps it over the steps of the
whole schedule, so that the first batches of the next stage are read before a stage ends, a resumed run asks for the
step where it stands, and neither the number of threads nor that of processes changes a bit.

This is the only file that imports grain. It does not import JAX: worker processes would occupy the accelerator.
"""

import errno
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from numpy.typing import DTypeLike

from pgps_jax.architecture import Size
from pgps_jax.curriculum import Schedule, Stage
from pgps_jax.data.sampling import BatchDraw, SamplingConfig, cut_crops, draw_batch, is_annotated, place_crops
from pgps_jax.data.store import CaseStore, StoredCase
from pgps_jax.errors import InputError
from pgps_jax.host_memory import gib, host_bytes_left

_PURPOSES = {"training": 0, "validation": 1}  # part of the seed: both kinds of batches are numbered from 0
_OPEN_BYTES = 1024**3  # of files and tables that stay mapped between batches
_AHEAD_BYTES = 512 * 1024**2  # of batches that are read ahead, if that is more than the fewest that keep threads busy
_MOST_AHEAD = 16
_CACHE_BYTES = 256 * 1024**2  # small datasets fit; reading them from memory takes half the time
_WAITS = (1.0, 2.0, 5.0, *[10.0] * 90)  # seconds between tries while a folder is out of reach: a quarter of an hour
_PASSING = {getattr(errno, name, None) for name in ("EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH")}


class PatchBatch(NamedTuple):
    """Patches as they cross to the device; NumPy arrays here, JAX arrays from there on."""

    image: Any  # (b, d, h, w, c) float32, float16 or bfloat16; 0 outside the case
    label: Any  # (b, d, h, w) int8 or int16; -1 outside the case and outside the body


class PatchSource:
    """All batches of a run by their number. Picklable; batches can be made in any order and by several threads.

    Args:
        store: where the preprocessed cases are.
        case_ids: the cases to draw from, best ranked first: a schedule may use only the first ones.
        schedule: patch size, batch size and number of cases in use of every step.
        crop_sizes: what to cut for each stage, at least its patch size (augmentation may need more).
        planned_batch_size: of the plan; the stages' batch sizes may be larger.
        seed: together with the step it decides everything about a batch.
        purpose: training and validation batches of the same number differ.
        image_dtype, label_dtype: types of the batches. float16 halves what crosses to the device.
        share: (i, n): make only the i-th of n equal parts of each batch, for runs with n processes.
        cache_bytes: keep whole cases in memory, decompressed, as long as they fit in this many bytes.

    Raises:
        InputError: a value does not fit the cases, naming it.
    """

    def __init__(
        self,
        store: CaseStore,
        case_ids: Sequence[str],
        schedule: Schedule,
        sampling: SamplingConfig,
        crop_sizes: Sequence[Size],
        planned_batch_size: int,
        *,
        seed: int,
        purpose: Literal["training", "validation"] = "training",
        image_dtype: DTypeLike = np.float32,
        label_dtype: DTypeLike = np.int16,
        share: tuple[int, int] = (0, 1),
        cache_bytes: int = _CACHE_BYTES,
    ):
        self.case_ids, self.schedule, self.crop_sizes = tuple(case_ids), schedule, tuple(crop_sizes)
        self._sampling, self._planned_batch_size = sampling, planned_batch_size
        self._seed = (seed, _PURPOSES[purpose])
        self._dtypes = np.dtype(image_dtype), np.dtype(label_dtype)
        self._share = share
        self._cases, self._folder = _OpenCases(store, _OPEN_BYTES, cache_bytes), store.folder
        self._weights = self._check(store)

    def _check(self, store: CaseStore) -> np.ndarray:
        """Weights of the cases, if everything fits together."""
        self._sampling.check()
        if not self.case_ids:
            raise InputError("There are no cases to cut patches from; check the fold.")
        if self._seed[0] < 0:
            raise InputError(f"seed: must not be negative, found {self._seed[0]}")
        if len(self.crop_sizes) != len(self.schedule.stages):
            raise ValueError(f"{len(self.crop_sizes)} crop sizes for {len(self.schedule.stages)} stages")
        for stage in self.schedule.stages:
            if stage.batch_size % self._share[1]:
                raise InputError(f"stage {stage}: the batch cannot be divided among {self._share[1]} processes")
        weights = dict(self._sampling.case_weights)
        if unknown := sorted(set(weights) - set(store.ids)):
            raise InputError(f"sampling: case-weights names {', '.join(unknown)}, which {store.folder} does not hold")
        found = np.array([weights.get(case, 1.0) for case in self.case_ids])
        if not found[: self.schedule.case_pool_of_step.min()].sum() > 0:
            raise InputError("sampling: case-weights exclude every case in use; give at least one a weight above 0")
        with self._cases.get(self.case_ids[0]) as case:
            self._channels = case.image.shape[0]
            classes = [label for label in case.locations if not is_annotated(label)]
        if self._sampling.class_weights and len(self._sampling.class_weights) != len(classes):
            raise InputError(
                f"sampling: class-weights has {len(self._sampling.class_weights)} values, but there are {len(classes)} "
                f"foreground classes or regions: {', '.join(map(str, classes))}"
            )
        return found

    def __len__(self) -> int:
        return self.schedule.num_steps

    def draw_of_step(self, step: int) -> tuple[Stage, BatchDraw]:
        """What a step's batch is made of, without reading anything."""
        stage, pool = self.schedule.stage_at(step), int(self.schedule.case_pool_of_step[step])
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([*self._seed, step])))
        weights = self._weights[:pool]
        return stage, draw_batch(rng, self._sampling, stage.batch_size, self._planned_batch_size, weights, step)

    def cases_of_step(self, step: int) -> tuple[str, ...]:
        """Ids of the cases that a step's batch is cut from."""
        return tuple(self.case_ids[i] for i in np.unique(self.draw_of_step(step)[1].case))

    def batch_of_step(self, step: int) -> PatchBatch:
        """The batch of a step. While the folder is out of reach, as when a network drive is lost, it waits, up to 15 minutes.

        Raises:
            InputError: a case cannot be read, naming step, stage, case, shape, cause and free memory.
        """
        for wait in (*_WAITS, None):
            try:
                return self._cut_batch(step)
            except InputError as error:
                if wait is None or not self._out_of_reach(error):
                    raise
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _out_of_reach(self, error: InputError) -> bool:
        """Whether trying again may help: the folder is gone or its disk does not answer, not a case in it."""
        cause = error.__cause__
        return not self._folder.is_dir() or (isinstance(cause, OSError) and cause.errno in _PASSING)

    def _cut_batch(self, step: int) -> PatchBatch:
        stage, draw = self.draw_of_step(step)
        crop_size = self.crop_sizes[stage.index]
        part, parts = self._share
        mine = np.arange(stage.batch_size).reshape(parts, -1)[part]
        image = np.zeros((len(mine), *crop_size, self._channels), self._dtypes[0])
        label = np.full((len(mine), *crop_size), -1, self._dtypes[1])
        for index in np.unique(draw.case[mine]):
            rows = np.flatnonzero(draw.case[mine] == index)
            name = self.case_ids[index]
            try:
                with self._cases.get(name) as case:
                    placed = place_crops(
                        draw.numbers[mine[rows]], draw.forced[mine[rows]], tuple(case.seg.shape[1:]), case.locations,
                        crop_size, stage.patch_size, self._sampling,
                    )
                    cut_crops(case, placed.start, image, label, rows)
            except (OSError, RuntimeError, ValueError, MemoryError) as error:
                raise InputError(
                    f"Step {step}, stage {stage.index}: no patch of {'x'.join(map(str, crop_size))} can be cut from case {name} in "
                    f"{self._folder} ({str(error) or type(error).__name__}); {gib(host_bytes_left())} of memory are free."
                ) from error
        return PatchBatch(image, label)

    def batch_bytes(self, stage: Stage) -> int:
        """Size of one batch of a stage in host memory."""
        voxels = stage.batch_size // self._share[1] * int(np.prod(self.crop_sizes[stage.index]))
        return voxels * (self._channels * self._dtypes[0].itemsize + self._dtypes[1].itemsize)


class PatchStream:
    """Iterator over the batches of a source from `first_step` on, read ahead. Close it, or use it in a `with`.

    Args:
        stop: the step before which it ends; the source's end when not given.
        threads: that read and cut, in each process.
        processes: worker processes; 0 reads in this process, which is faster unless cores lie idle. Workers are
            spawned, so a script needs `if __name__ == "__main__"`.
        ahead: how many batches are read ahead; by default as many as fit 512 MiB, at least `threads`, at most 16.
        stall_seconds: after how long a wait, and how often from then on, to tell which step it is for.
        say: receives these messages.
    """

    def __init__(
        self,
        source: PatchSource,
        first_step: int = 0,
        *,
        stop: int | None = None,
        threads: int = 2,
        processes: int = 0,
        ahead: int | None = None,
        stall_seconds: float = 60.0,
        say: Callable[[str], Any] = print,
    ):
        self.step = first_step  # number of the batch that comes next
        self.waited_seconds = 0.0  # how long the last `next` waited for its batch
        self._source, self._stall_seconds, self._say, self._copies = source, stall_seconds, say, processes > 0
        if ahead is None:
            largest = max(source.batch_bytes(stage) for stage in source.schedule.stages)
            ahead = read_ahead(largest, threads)
        stop = len(source) if stop is None else min(stop, len(source))
        steps = grain.MapDataset.range(first_step, stop) if first_step < stop else None
        self._batches: Iterator[PatchBatch] = iter(())
        if steps is not None:
            options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
            batches = steps.map(source.batch_of_step).to_iter_dataset(options)
            if processes:
                _let_grain_start_processes()
                batches = batches.mp_prefetch(grain.MultiprocessingOptions(processes, per_worker_buffer_size=1))
            self._batches = iter(batches)
        self._waiting_since: float | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="patch-stream-watchdog", daemon=True).start()

    def __iter__(self) -> "PatchStream":
        return self

    def __next__(self) -> PatchBatch:
        began = self._waiting_since = time.perf_counter()
        try:
            image, label = next(self._batches)
        except RuntimeError as error:  # grain's, when a worker process died
            raise RuntimeError(f"the batch of step {self.step} was not made: {error}") from error
        finally:
            self._waiting_since, self.waited_seconds = None, time.perf_counter() - began
        self.step += 1
        if self._copies:  # arrays of a process lie in shared memory, which is scarce
            image, label = np.array(image), np.array(label)
        return PatchBatch(image, label)

    def _watch(self) -> None:
        """Tell of waits that are too long, once per `stall_seconds`."""
        told: tuple[float | None, int] = (None, 0)
        while not self._closed.wait(min(1.0, self._stall_seconds / 4)):
            since = self._waiting_since
            if since is None:
                continue
            times = int((time.perf_counter() - since) / self._stall_seconds)
            if times > 0 and told != (since, times):
                told = (since, times)
                cases = self._source.cases_of_step(self.step)
                shown = ", ".join(cases[:4]) + (f" and {len(cases) - 4} others" if len(cases) > 4 else "")
                self._say(
                    f"waiting since {time.perf_counter() - since:.0f} s for the batch of step {self.step}, "
                    f"which is cut from {shown}; is the disk slow or gone?"
                )

    def close(self) -> None:
        """Stop reading ahead and end the worker processes."""
        self._closed.set()
        if hasattr(self._batches, "close"):
            self._batches.close()
        self._batches = iter(())

    def __enter__(self) -> "PatchStream":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_ahead(batch_bytes: int, threads: int) -> int:
    """How many batches of a size wait in host memory: as many as fit 512 MiB, but enough to keep the threads busy."""
    return min(max(_AHEAD_BYTES // max(batch_bytes, 1), threads), _MOST_AHEAD)


def stream(
    store: CaseStore,
    case_ids: Sequence[str],
    schedule: Schedule,
    sampling: SamplingConfig,
    crop_sizes: Sequence[Size],
    planned_batch_size: int,
    *,
    seed: int,
    first_step: int = 0,
    threads: int = 2,
    processes: int = 0,
    image_dtype: DTypeLike = np.float32,
    label_dtype: DTypeLike = np.int16,
    share: tuple[int, int] = (0, 1),
    cache_bytes: int = _CACHE_BYTES,
    say: Callable[[str], Any] = print,
) -> PatchStream:
    """The training batches from `first_step` on; see `PatchSource` and `PatchStream` for the arguments."""
    source = PatchSource(
        store, case_ids, schedule, sampling, crop_sizes, planned_batch_size, seed=seed, image_dtype=image_dtype,
        label_dtype=label_dtype, share=share, cache_bytes=cache_bytes,
    )
    return PatchStream(source, first_step, threads=threads, processes=processes, say=say)


def validation_source(
    store: CaseStore,
    case_ids: Sequence[str],
    stage: Stage,
    sampling: SamplingConfig,
    *,
    seed: int,
    num_batches: int,
    image_dtype: DTypeLike = np.float32,
    label_dtype: DTypeLike = np.int16,
    share: tuple[int, int] = (0, 1),
) -> PatchSource:
    """Validation batches of the planned patch, cut without a margin; batch i depends on (seed, i) only."""
    everything = np.full(num_batches, len(case_ids), np.int32)
    schedule = Schedule((Stage(0, stage.patch_size, stage.batch_size),), np.zeros(num_batches, np.int32), everything)
    return PatchSource(
        store, case_ids, schedule, sampling, [stage.patch_size], stage.batch_size, seed=seed, purpose="validation",
        image_dtype=image_dtype, label_dtype=label_dtype, share=share,
    )


# -------------------------------------------------------------------------------------------------------- opened cases


class _Opened:
    """An opened case, used by one thread at a time: `with opened as case`. Blosc2 arrays are not meant to be shared."""

    def __init__(self, case: StoredCase):
        self._case, self._lock = case, threading.Lock()
        self.bytes = sum(voxels.nbytes for voxels in case.locations.values()) + sum(
            getattr(array, "cbytes", array.nbytes) for array in (case.image, case.seg)
        )
        self.bytes_in_memory = case.image.nbytes + case.seg.nbytes

    def __enter__(self) -> StoredCase:
        self._lock.acquire()
        return self._case

    def __exit__(self, *_) -> None:
        self._lock.release()

    def read_into_memory(self) -> None:
        with self as case:
            if not isinstance(case.image, np.ndarray):
                self._case = case._replace(image=case.image[:], seg=case.seg[:])


class _OpenCases:
    """Keeps cases open between batches.

    The first cases that fit into `cache_bytes` are held in memory for good: with random draws that finds as much as
    forgetting the oldest would, and reads every case once. Of the others the least recently used is closed when all
    open ones together map more than `open_bytes`.
    """

    def __init__(self, store: CaseStore, open_bytes: int, cache_bytes: int):
        self._arguments = (store, open_bytes, cache_bytes)
        self._store, self._open_left, self._cache_left = store, open_bytes, cache_bytes
        self._open: OrderedDict[str, _Opened] = OrderedDict()
        self._cached: dict[str, _Opened] = {}
        self._lock = threading.Lock()

    def __reduce__(self):
        return _OpenCases, self._arguments  # every process opens its own

    def get(self, case_id: str) -> _Opened:
        """The case, opened now or earlier; raises what `CaseStore.open` raises."""
        with self._lock:
            if case_id in self._cached:
                return self._cached[case_id]
            if case_id in self._open:
                self._open.move_to_end(case_id)
                return self._open[case_id]
        opened = _Opened(self._store.open(case_id))  # without the lock, so that threads do not wait for each other's disk
        with self._lock:
            if (earlier := self._cached.get(case_id) or self._open.get(case_id)) is not None:
                return earlier
            cached = opened.bytes_in_memory <= self._cache_left
            if cached:
                self._cached[case_id] = opened
                self._cache_left -= opened.bytes_in_memory
            else:
                self._open[case_id] = opened
                self._open_left -= opened.bytes
                while self._open_left < 0 and len(self._open) > 1:
                    self._open_left += self._open.popitem(last=False)[1].bytes
        if cached:
            opened.read_into_memory()
        return opened


def _let_grain_start_processes() -> None:
    """grain 0.2.18 reads an absl flag when it starts processes, which fails unless some program has parsed flags."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
