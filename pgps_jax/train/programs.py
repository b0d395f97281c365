"""The stage manager: one compiled training program per stage, made ahead of time so that a stage switch never waits.

While one stage trains, the program of the next is compiled in a background thread: XLA's compiler lets go of Python's
lock, so training goes on beside it. A program accepts its own shapes only; nothing compiles behind anybody's back.
"""

import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pgps_jax.curriculum import Schedule, Stage, parts_at_least
from pgps_jax.train.memory import program_bytes

CACHE_HIT = "/jax/compilation_cache/cache_hits"


class ProgramTiming(NamedTuple):
    """What a stage's program cost: seconds of tracing and compiling, whether XLA's work came from the persistent cache,
    seconds that training stood still for it, the device memory that it needs, and seconds of its first step, when that is done."""

    stage: Stage
    trace_seconds: float
    compile_seconds: float
    cached: bool
    stall_seconds: float
    program_bytes: int
    first_step_seconds: float | None = None

    def record(self) -> dict[str, Any]:
        """JSON-able record for the log."""
        return self._asdict() | {"stage": self.stage.index, "patch_size": list(self.stage.patch_size),
                                 "batch_size": self.stage.batch_size}

    def __str__(self) -> str:
        source = "from the cache" if self.cached else "compiled"
        first = "" if self.first_step_seconds is None else f", first step {self.first_step_seconds:.2f} s"
        return (f"stage {self.stage.index} ({self.stage}): traced {self.trace_seconds:.2f} s, {source} "
                f"{self.compile_seconds:.2f} s, training waited {self.stall_seconds:.2f} s{first}")


class ProgramError(RuntimeError):
    """A stage's program could not be made; the cause is attached."""


class StagePrograms:
    """Compiled programs by stage.

    `lower` traces the program of a stage. It runs in a background thread, where context managers of jax that are open
    in the caller (meshes, default precision) do not hold; set such things globally or inside `lower`.

    Every stage is compiled once, however often and from wherever it is asked for, until it is dropped. Use it in a
    `with` statement, or call `close`.
    """

    def __init__(
        self,
        lower: Callable[[Stage], jax.stages.Lowered],
        compiler_options: dict[str, Any] | None = None,
        threads: int | None = None,
    ):
        self._lower = lower
        self._options = compiler_options or None
        self._threads = ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="compile")
        self._programs: dict[Stage, Future] = {}
        self._cache_hits = threading.local()
        self.compilations: Counter[Stage] = Counter()
        jax.monitoring.register_event_listener(self._listen)

    def get(self, stage: Stage) -> jax.stages.Compiled:
        """The program of a stage, waiting for it if need be.

        Raises ProgramError naming the stage if it cannot be made; asking again tries again.
        """
        future = self._start(stage)
        try:
            return future.result()[0]
        except Exception as error:
            self.drop(stage)
            raise ProgramError(f"stage {stage.index} ({stage}): its program could not be made: {error}") from error

    def timing(self, stage: Stage) -> ProgramTiming:
        """What the program of a stage cost; waits for it, and tells the seconds waited just now as its stall. Raises as `get`."""
        begin = time.perf_counter()
        self.get(stage)
        _, timing = self._start(stage).result()
        return timing._replace(stall_seconds=time.perf_counter() - begin)

    def prefetch(self, *stages: Stage) -> None:
        """Start making the programs of stages in the background, in this order, unless that has been done."""
        for stage in stages:
            self._start(stage)

    def keep(self, stages: Collection[Stage]) -> None:
        """Let go of all programs but those of these stages."""
        for stage in set(self._programs) - set(stages):
            self.drop(stage)

    def drop(self, stage: Stage) -> None:
        """Let go of a program that is not needed any more; when its turn has not come yet, it is not made."""
        if future := self._programs.pop(stage, None):
            future.cancel()

    def close(self) -> None:
        """Forget all programs; what is being compiled is finished, what waits for its turn is not begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._programs.clear()
        jax.monitoring.unregister_event_listener(self._listen)

    def __enter__(self) -> "StagePrograms":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _start(self, stage: Stage) -> Future:
        if stage not in self._programs:
            self._programs[stage] = self._threads.submit(self._make, stage)
        return self._programs[stage]

    def _make(self, stage: Stage) -> tuple[jax.stages.Compiled, ProgramTiming]:
        self.compilations[stage] += 1
        self._cache_hits.count = 0
        begin = time.perf_counter()
        lowered = self._lower(stage)
        traced = time.perf_counter()
        compiled = lowered.compile(compiler_options=self._options)
        done = time.perf_counter()
        cached = self._cache_hits.count > 0
        return compiled, ProgramTiming(stage, traced - begin, done - traced, cached, 0.0, program_bytes(compiled))

    def _listen(self, event: str, **_) -> None:
        if event == CACHE_HIT:  # jax reports in the thread that compiles
            self._cache_hits.count = getattr(self._cache_hits, "count", 0) + 1


def stages_from(schedule: Schedule, step: int) -> list[Stage]:
    """Stages of a step and of those after it, in the order of their first use."""
    indices, first = np.unique(schedule.stage_of_step[step:], return_index=True)
    return [schedule.stages[i] for i in indices[np.argsort(first)]]


def halve_batch(schedule: Schedule, stage_index: int, multiple_of: int = 1) -> Schedule:
    """The schedule after a stage ran out of memory: half its batch, rounded down to what the devices can share.

    Raises ValueError if the batch cannot become smaller; the error that led here should then be raised.
    """
    stage = schedule.stages[stage_index]
    batch = stage.batch_size // 2 // multiple_of * multiple_of
    if batch < multiple_of:
        raise ValueError(f"stage {stage_index} ({stage}): {multiple_of} devices cannot share less than it has")
    parts = parts_at_least(batch, stage.parts, multiple_of) if stage.parts > 1 else 1
    return _with_stage(schedule, replace(stage, batch_size=batch, parts=parts))


def more_parts(schedule: Schedule, stage_index: int, multiple_of: int = 1) -> Schedule:
    """The schedule after a stage ran out of memory: the same batch, in at least twice as many parts.

    Raises ValueError if its parts cannot become smaller.
    """
    stage = schedule.stages[stage_index]
    parts = parts_at_least(stage.batch_size, 2 * stage.parts, multiple_of)
    if parts <= stage.parts:
        raise ValueError(f"stage {stage_index} ({stage}): {multiple_of} devices cannot share less than a part has")
    return _with_stage(schedule, replace(stage, parts=parts))


def _with_stage(schedule: Schedule, stage: Stage) -> Schedule:
    return replace(schedule, stages=tuple(stage if s.index == stage.index else s for s in schedule.stages))


def enable_compilation_cache(folder: Path, max_bytes: int) -> str | None:
    """Let JAX keep compiled programs in `folder` from run to run; returns a sentence if that is not possible.

    What lies in the cache is run as machine code, so the folder must belong to this user and be writable to nobody
    else; it is made that way if missing. The programs unused for longest are deleted beyond `max_bytes`.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.lstat()
    except OSError as error:
        return f"compiled programs are not kept: {folder} cannot be used ({error.strerror})"
    if not stat.S_ISDIR(state.st_mode):
        return f"compiled programs are not kept: {folder} is not a folder"
    if hasattr(os, "getuid"):  # Windows has neither owners nor modes of this kind
        if state.st_uid != os.getuid():
            return f"compiled programs are not kept: {folder} belongs to another user"
        if state.st_mode & 0o022:
            return f"compiled programs are not kept: others may write to {folder}; chmod 700 it"
    _delete_oldest(folder, max_bytes)  # jax's own limit needs another package
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return None


def _delete_oldest(folder: Path, max_bytes: int) -> None:
    """Delete the files that were not used for longest until the others take no more than `max_bytes`."""
    used = []
    for path in folder.rglob("*"):
        try:
            state = path.lstat()
        except FileNotFoundError:  # another run deletes too
            continue
        if stat.S_ISREG(state.st_mode):
            used.append((max(state.st_atime, state.st_mtime), state.st_size, path))
    total = sum(size for _, size, _ in used)
    for _, size, path in sorted(used):
        if total <= max_bytes:
            break
        path.unlink(missing_ok=True)
        total -= size
