"""Before a run's first step: batch sizes that fill the device, and a length that fits a time budget.

Both need compiled programs, so they are found once, written to schedule.json and read again on resume. The length is
corrected at the ends of stages, when more is known.
"""

import dataclasses
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pgps_jax.curriculum import Schedule, Stage, batch_policy, parts_at_least, with_batch_sizes
from pgps_jax.pacing import fit_to_seconds, rescale_rest
from pgps_jax.train.device import Device, open_device
from pgps_jax.train.memory import choose_batch_size, device_budget, is_out_of_memory, program_bytes, share_of_dataset
from pgps_jax.train.meter import Meter
from pgps_jax.train.setup import initial_state, program_options, stage_batch, stage_lowering
from pgps_jax.workspace import Experiment, planned_schedule, store_schedule, with_schedule

PREFETCHED_BATCHES = 2  # that wait on the device beside the one in use
TIMED_STEPS = 3
SHARE_OF_STEPS = 0.9  # of a time budget; the rest is for compiling, validation and checkpoints
WORTH_CORRECTING = 0.03  # share by which the rest of a schedule may miss its time budget before it is changed


def sized(run: Experiment, say: Callable[[str], None]) -> Experiment:
    """The experiment with batch sizes and length found on this machine, where its config asks for that."""
    if batch_policy(run.config.curriculum) == "device-memory":
        run = fill_memory(run, say)
    elif run.config.accumulate != 1:
        run = in_parts(run, say)
    if run.config.max_hours is not None:
        run = fit_hours(run, say)
    return run


def fill_memory(run: Experiment, say: Callable[[str], None]) -> Experiment:
    """Batch sizes that fill the device's memory, one per stage; nothing is executed.

    Raises InputError when not even the smallest batch of a stage fits.
    """
    device = open_device(run.schedule.stages, run.config.network.precision)
    graphdef, state = initial_state(run, device)
    lower = stage_lowering(run, device, graphdef, state)
    del state
    options = program_options(run, device)
    features = run.configuration.architecture.first_features
    budget = device_budget(run.config.curriculum.memory_fraction)
    chosen = []
    share, voxels = run.config.curriculum.dataset_share, math.prod(run.configuration.median_shape) * num_cases(run)
    for stage in run.schedule.stages:
        waiting = sum(s.size * s.dtype.itemsize for s in stage_batch(run, device, stage)) // stage.batch_size
        choice = choose_batch_size(
            lambda batch, stage=stage: lower(dataclasses.replace(stage, batch_size=batch)).compile(options),
            stage, budget, elements_per_patch=math.prod(stage.patch_size) * features,
            multiple_of=len(jax.devices()), extra_bytes_per_patch=PREFETCHED_BATCHES * waiting,
            max_batch=None if share is None else share_of_dataset(voxels, stage.patch_size, share),
        )
        say(choice.reason)
        chosen.append(choice.batch_size)
    return with_schedule(run, with_batch_sizes(run.schedule, chosen))


def num_cases(run: Experiment) -> int:
    """Cases that are trained or validated on."""
    return len({*run.train_ids, *run.validation_ids})


def in_parts(run: Experiment, say: Callable[[str], None]) -> Experiment:
    """Batches computed in parts: in as many as asked for (fewer where a batch has fewer patches), or in as few as fit the device.

    For the latter stages are compiled, those of the most voxels first, until one fits as a whole: what has fewer voxels fits too.
    """
    wanted = run.config.accumulate
    device = open_device(run.schedule.stages, run.config.network.precision)
    parts = {stage: 1 for stage in run.schedule.stages}
    if wanted == "auto":
        graphdef, state = initial_state(run, device)
        lower = stage_lowering(run, device, graphdef, state)
        del state
        for stage in sorted(run.schedule.stages, key=lambda s: s.voxels, reverse=True):
            parts[stage] = fewest_parts(run, device, lower, stage)
            if parts[stage] == 1:
                break
    else:
        parts = {stage: parts_at_least(stage.batch_size, wanted, device.count) for stage in run.schedule.stages}
    stages = tuple(dataclasses.replace(stage, parts=parts[stage]) for stage in run.schedule.stages)
    for stage in stages:
        if stage.parts > 1:
            say(f"stage {stage.index}: {stage}")
    return with_schedule(run, dataclasses.replace(run.schedule, stages=stages))


def fewest_parts(run: Experiment, device: Device, lower: Callable[[Stage], jax.stages.Lowered], stage: Stage) -> int:
    """The fewest parts with which a stage's program fits the device; as many as there can be if none does."""
    budget, options = device_budget(run.config.curriculum.memory_fraction), program_options(run, device)
    waiting = PREFETCHED_BATCHES * sum(s.size * s.dtype.itemsize for s in stage_batch(run, device, stage)) // device.count
    while True:
        try:
            needed = program_bytes(lower(stage).compile(options)) + waiting
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            needed = math.inf
        more = parts_at_least(stage.batch_size, stage.parts + 1, device.count)
        if needed <= budget or more <= stage.parts:
            return stage.parts
        stage = dataclasses.replace(stage, parts=more)


def fit_hours(run: Experiment, say: Callable[[str], None]) -> Experiment:
    """Shorten the run so that all its stages fit `max_hours`, from the seconds per step of the smallest and largest stages.

    The seconds of the others lie on the line through both, by voxels; borders are corrected while training.
    """
    device = open_device(run.schedule.stages, run.config.network.precision)
    by_voxels = sorted(run.schedule.stages, key=lambda stage: stage.voxels)
    ends = [by_voxels[0], by_voxels[-1]]
    voxels, seconds = zip(*((stage.voxels, seconds_per_step(run, device, stage)) for stage in ends), strict=True)

    def estimate(stage: Stage) -> float:
        return float(np.interp(stage.voxels, voxels, seconds)) if voxels[0] < voxels[1] else seconds[1]

    def make(num_steps: int) -> Schedule:
        return planned_schedule(run.config, run.configuration, len(run.train_ids), num_steps)

    budget = SHARE_OF_STEPS * 3600 * run.config.max_hours
    steps = fit_to_seconds(make, estimate, budget, run.config.steps_per_epoch, run.config.epochs * run.config.steps_per_epoch)
    say(f"{steps} of {run.config.epochs * run.config.steps_per_epoch} steps fit {run.config.max_hours:g} hours "
        f"({seconds[0]:.3g} s per step in the smallest stage, {seconds[1]:.3g} s in the largest)")
    sizes = {stage.patch_size: {"batch_size": stage.batch_size, "parts": stage.parts} for stage in run.schedule.stages}
    schedule = make(steps)
    stages = tuple(dataclasses.replace(stage, **sizes.get(stage.patch_size, {})) for stage in schedule.stages)
    return with_schedule(run, dataclasses.replace(schedule, stages=stages))


def seconds_per_step(run: Experiment, device, stage: Stage) -> float:
    """Median seconds of a training step on empty patches."""
    graphdef, state = initial_state(run, device)
    program = stage_lowering(run, device, graphdef, state)(stage).compile(program_options(run, device))
    batch = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), stage_batch(run, device, stage))
    taken = []
    for _ in range(TIMED_STEPS + 1):
        began = time.perf_counter()
        state, metrics = program(state, batch, np.float32(0))
        jax.block_until_ready(metrics)
        taken.append(time.perf_counter() - began)
    return float(np.median(taken[1:]))


def in_time(run: Experiment, meter: Meter, done: int, say: Callable[[str], None]) -> Experiment:
    """Stretch or shorten what is left of the schedule so that the time budget is kept; the same run if it is close enough."""
    left = 3600 * run.config.max_hours * SHARE_OF_STEPS - meter.seconds_spent()
    schedule = rescale_rest(run.schedule, done, meter.seconds_per_step, max(left, 1.0))
    longest = run.config.epochs * run.config.steps_per_epoch
    change = (schedule.num_steps - run.num_steps) / max(run.num_steps - done, 1)
    if abs(change) < WORTH_CORRECTING or schedule.num_steps > longest:
        return run
    corrected = with_schedule(run, schedule)
    store_schedule(corrected)
    say(f"{run.num_steps} steps were planned; {corrected.num_steps} keep the budget of {run.config.max_hours:g} hours")
    return corrected
