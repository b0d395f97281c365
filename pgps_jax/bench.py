"""How fast input and steps of a run would be on this machine, alone and together, without training or writing anything."""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from pgps_jax.config import RunConfig
from pgps_jax.curriculum import Schedule, Stage
from pgps_jax.data.pipeline import PatchStream
from pgps_jax.errors import InputError
from pgps_jax.host_memory import host_bytes_left
from pgps_jax.report.bench import Host, StageBench
from pgps_jax.train.augment import crop_size
from pgps_jax.train.device import Device, open_device, put
from pgps_jax.train.memory import is_out_of_memory
from pgps_jax.train.setup import initial_state, open_stream, program_options, stage_lowering
from pgps_jax.train.sizing import sized
from pgps_jax.workspace import Experiment, open_experiment, run_folder, with_schedule

try:
    import resource
except ImportError:  # Windows
    resource = None

SAMPLED_CASES = 50  # that are asked for their size
READ_BEFORE = 2  # batches that do not count, because reading starts before the clock does
ENOUGH_STEPS = 10**6  # of the schedule from which one stage's batches are drawn


def open_bench(config: RunConfig, say: Callable[[str], None]) -> Experiment:
    """The experiment that a config describes, apart from any run folder; batch sizes are found as training would.

    Raises InputError as `open_experiment` does.
    """
    apart = dataclasses.replace(config, name=f"bench-{os.getpid()}-{time.time_ns()}", fresh=False, max_hours=None)
    run = open_experiment(apart, say)
    assert not run_folder(apart).exists()
    return sized(run, say)


def chosen_stages(run: Experiment, wanted: Sequence[int]) -> list[Stage]:
    """The stages with the wanted numbers; the first, middle and last one if none are named."""
    stages = [stage for stage in run.schedule.stages if stage.index in run.schedule.stage_of_step]
    if not wanted:
        return [stages[i] for i in sorted({0, len(stages) // 2, len(stages) - 1})]
    by_index = {stage.index: stage for stage in stages}
    if unknown := [i for i in wanted if i not in by_index]:
        raise InputError(f"--stages {' '.join(map(str, unknown))}: the schedule has the stages {', '.join(map(str, by_index))}")
    return [by_index[i] for i in dict.fromkeys(wanted)]


def host_of(run: Experiment) -> Host:
    """Sizes of the training cases beside those of the machine."""
    files = [path for case_id in run.train_ids for path in _files(run, case_id)]
    sample = run.train_ids[:: -(-len(run.train_ids) // SAMPLED_CASES)]
    opened = [run.store.open(case_id) for case_id in sample]
    mean = sum(case.image.nbytes + case.seg.nbytes for case in opened) / len(opened)
    return Host(
        cores=_cores(), threads=run.config.threads, processes=run.config.loader_processes, cache_bytes=int(1e9 * run.config.cache_gb),
        stored_bytes=sum(path.stat().st_size for path in files), case_bytes=int(mean * len(run.train_ids)), free_bytes=host_bytes_left(),
        larger_crops=any(crop_size(run.policy, stage.patch_size) != stage.patch_size for stage in run.schedule.stages),
    )  # fmt: skip


def measure_stage(run: Experiment, stage: Stage, seconds: float, say: Callable[[str], None]) -> StageBench:
    """Rates of one stage; each of the four measurements takes about `seconds`, compiling and a last long step apart.

    Raises InputError if the device has too little memory for the stage.
    """
    steps = np.full(ENOUGH_STEPS, stage.index, np.int32)
    schedule = Schedule(run.schedule.stages, steps, np.full(ENOUGH_STEPS, len(run.train_ids), np.int32))
    run = with_schedule(run, schedule)
    device = open_device(run.schedule.stages, run.config.network.precision)
    forgotten = _forget_files(run)
    cold, rate, busy, disk_reads = _input_alone(run, device, seconds, say)
    try:
        step, both, wait = _with_steps(run, device, stage, seconds, say)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"stage {stage.index} ({stage}): the device has too little memory; try --accumulate auto") from error
    return StageBench(stage, cold if forgotten else None, rate, step, both, wait, busy, disk_reads)


def _input_alone(run: Experiment, device: Device, seconds: float, say: Callable[[str], None]) -> tuple[float, float, float | None, float]:
    """Batches per second from the very first on, and once read before; of the latter, share of the cores' time and disk reads per batch."""
    began = time.perf_counter()
    with open_stream(run, device, 0, say) as batches:
        first = _rate(batches, seconds, began)
        for _ in range(READ_BEFORE):
            next(batches)
        used, faults, began = time.process_time(), _disk_reads(), time.perf_counter()
        rate = _rate(batches, seconds, began)
        lasted, used = time.perf_counter() - began, time.process_time() - used
        reading = min(run.config.threads, _cores())
        busy = None if run.config.loader_processes else used / lasted / reading
        return first, rate, busy, (_disk_reads() - faults) / (rate * lasted)


def _rate(batches: PatchStream, seconds: float, began: float) -> float:
    count = 0
    while count == 0 or time.perf_counter() - began < seconds:
        next(batches)
        count += 1
    return count / (time.perf_counter() - began)


def _with_steps(run: Experiment, device: Device, stage: Stage, seconds: float, say: Callable[[str], None]) -> tuple[float, float, float]:
    """Steps per second on one batch, and with input as in training, and the share of the latter's time spent waiting for input."""
    graphdef, state = initial_state(run, device)
    program = stage_lowering(run, device, graphdef, state)(stage).compile(program_options(run, device))
    still = np.float32(0)  # learning rate: the weights stay, so that nothing can grow beyond measure
    with open_stream(run, device, 0, say) as batches:
        batch = put(next(batches), device)
        state, metrics = program(state, batch, still)
        jax.block_until_ready(metrics)
        began, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - began < seconds:
            state, metrics = program(state, batch, still)
            jax.block_until_ready(metrics)
            count += 1
        alone = count / (time.perf_counter() - began)

        for _ in range(READ_BEFORE):
            state, metrics = program(state, put(next(batches), device), still)
        jax.block_until_ready(metrics)
        began, count, waited = time.perf_counter(), 0, 0.0
        while count == 0 or time.perf_counter() - began < seconds:
            batch, before = next(batches), metrics
            waited += batches.waited_seconds
            state, metrics = program(state, put(batch, device), still)
            jax.block_until_ready(before)  # training, too, looks at the step before while one computes
            count += 1
        jax.block_until_ready(metrics)
        lasted = time.perf_counter() - began
    return alone, count / lasted, waited / lasted


def _forget_files(run: Experiment) -> bool:
    """Ask the system to drop the training cases from its memory; False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for case_id in run.train_ids:
        for path in _files(run, case_id):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
    return True


def _files(run: Experiment, case_id: str) -> list:
    return [run.store.folder / f"{case_id}{ending}" for ending in (".b2nd", "_seg.b2nd")]


def _disk_reads() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt if resource else 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_bench(seconds: float) -> None:
    """Raise InputError if the length of a measurement is none."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise InputError(f"--seconds {seconds}: must be above 0, and finite")
