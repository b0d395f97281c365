"""Before a run's first step: batch sizes that fill the device, pacing by measured time, and a length that fits a time budget.

All need compiled programs, so they are found once, written to schedule.json and read again on resume. The length is
corrected while training, when more is known.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pgps_jax.curriculum import Schedule, Stage, all_stages, batch_policy, parts_at_least
from pgps_jax.data.pipeline import read_ahead
from pgps_jax.errors import InputError
from pgps_jax.models import limits
from pgps_jax.pacing import fit_to_seconds, rescale_rest
from pgps_jax.train.device import Device, open_device
from pgps_jax.train.memory import choose_batch_size, device_budget, is_out_of_memory, program_bytes, share_of_dataset
from pgps_jax.train.meter import Meter
from pgps_jax.train.setup import initial_state, program_options, stage_batch, stage_lowering
from pgps_jax.train.state import state_bytes
from pgps_jax.workspace import Experiment, note_on_warm_up, planned_schedule, store_schedule, with_schedule

PREFETCHED_BATCHES = 2  # that wait on the device beside the one in use
LOADER_PROCESS = 300 * 2**20  # bytes of a Python process with NumPy and grain
JOINED = 2  # the largest activations of all networks are upsampled features and a skip, joined at full resolution
TIMED_STEPS = 3
FORWARD_SHARE = 1 / 3  # of a training step: what a validation batch takes, until that has been measured
SHARE_OF_STEPS = 0.9  # of a time budget, validation included; the rest is for compiling and checkpoints
WORTH_CORRECTING = 0.01  # share of a run's steps by which its length may miss the time budget before it is changed


def sized(run: Experiment, say: Callable[[str], None]) -> Experiment:
    """The experiment with batch sizes, pacing and length found on this machine, where its config asks for that.

    `say` hears what was found, and of what will not work as one might expect.
    """
    config = run.config
    by_time = config.max_hours is not None or config.curriculum.pacing == "equal-time"
    if by_time or config.accumulate != 1 or batch_policy(config.curriculum) == "device-memory":
        stages = sized_stages(run, by_time, say)
        estimate = seconds_by_voxels(run, stages) if by_time else None

        def make(num_steps: int) -> Schedule:
            seconds = None if estimate is None else [estimate(stage) for stage in stages]
            return planned_schedule(config, run.configuration, len(run.train_ids), num_steps, stages, seconds)

        run = with_schedule(run, make(run.num_steps))
        if config.max_hours is not None:
            run = with_schedule(run, make(steps_that_fit(run, make, estimate, say)))
    for note in (note_on_devices(run.schedule, len(jax.devices())), note_on_warm_up(config, run.schedule)):
        if note:
            say(note)
    return run


def sized_stages(run: Experiment, every: bool, say: Callable[[str], None]) -> tuple[Stage, ...]:
    """All stages of the curriculum, with batch sizes and parts for this device in those of the run's schedule, or in every one:
    a schedule that is shortened to fit a time leaves out others."""
    configuration, config = run.configuration, run.config
    ladder = all_stages(config.curriculum, configuration.patch_size, configuration.batch_size, limits(configuration.architecture))
    in_use = {stage.patch_size for stage in run.schedule.stages}
    stages = [stage for stage in ladder if every or stage.patch_size in in_use]
    if batch_policy(config.curriculum) == "device-memory":
        stages = fill_memory(run, stages, say)
    elif config.accumulate != 1:
        stages = in_parts(run, stages, say)
    of_patch = {stage.patch_size: stage for stage in stages}
    return tuple(of_patch.get(stage.patch_size, stage) for stage in ladder)


def fill_memory(run: Experiment, stages: Sequence[Stage], say: Callable[[str], None]) -> list[Stage]:
    """The stages with batch sizes that fill the device's memory, shared by all devices; nothing is executed.

    Raises InputError when not even the smallest batch of a stage fits, or nobody knows.
    """
    device = open_device((), run.config.network.precision)
    graphdef, state = initial_state(run, device)
    lower, size_of_state = stage_lowering(run, device, graphdef, state), state_bytes(state)
    del state
    options, budget = program_options(run, device), device_budget(run.config.curriculum.memory_fraction)
    if math.isinf(budget):
        raise InputError(f"--batch-policy device-memory: this {device.platform} does not tell how much memory it has; choose another")
    share = run.config.curriculum.dataset_share
    chosen = []
    for stage in stages:
        def with_batch(batch: int, stage: Stage = stage) -> Stage:
            return dataclasses.replace(stage, batch_size=batch)

        choice = choose_batch_size(
            lambda batch, with_batch=with_batch: lower(with_batch(batch)).compile(options), stage, budget,
            elements_per_patch=largest_activation(run, stage), multiple_of=device.count,
            outside=lambda batch, with_batch=with_batch: bytes_outside(run, device, size_of_state, with_batch(batch)),
            max_batch=None if share is None else share_of_dataset(dataset_voxels(run), stage.patch_size, share),
        )
        say(choice.reason)
        chosen.append(with_batch(choice.batch_size))
    return chosen


def largest_activation(run: Experiment, stage: Stage) -> int:
    """Elements per patch of the largest tensor in a network: joined features, image channels or logits at full resolution."""
    return math.prod(stage.patch_size) * max(JOINED * run.configuration.architecture.first_features, run.channels, run.labels.num_outputs)


def dataset_voxels(run: Experiment) -> float:
    """Voxels of all cases, by their median shape; those of the volumes in a planar configuration too, as nnU-Net counts them."""
    volumes = run.plan.configurations.get("3d_fullres") if run.configuration.is_2d else None
    return math.prod((volumes or run.configuration).median_shape) * len({*run.train_ids, *run.validation_ids})


def bytes_outside(run: Experiment, device: Device, size_of_state: int, stage: Stage) -> int:
    """Bytes that a stage needs in a device's memory outside of its program; CPU devices share the host's memory, and its needs."""
    on_host = host_bytes(run, device, size_of_state, stage) // len(jax.local_devices()) if device.platform == "cpu" else 0
    return waiting_bytes(run, device, stage) + on_host


def waiting_bytes(run: Experiment, device: Device, stage: Stage) -> int:
    """Bytes of the batches that wait on each device."""
    return PREFETCHED_BATCHES * batch_bytes(run, device, stage) // device.count


def host_bytes(run: Experiment, device: Device, size_of_state: int, stage: Stage) -> int:
    """Bytes on the host: batches read ahead, cases kept, loader processes, and the state while a checkpoint is written."""
    config, batch = run.config, batch_bytes(run, device, stage)
    ahead = (read_ahead(batch, config.threads) + config.threads) * batch * max(config.loader_processes, 1)
    return int(ahead + 1e9 * config.cache_gb + LOADER_PROCESS * config.loader_processes + 2 * size_of_state)


def batch_bytes(run: Experiment, device: Device, stage: Stage) -> int:
    """Bytes of a batch as the host cuts it."""
    return sum(array.size * array.dtype.itemsize for array in stage_batch(run, device, stage))


def in_parts(run: Experiment, stages: Sequence[Stage], say: Callable[[str], None]) -> list[Stage]:
    """The stages computed in parts: in as many as asked for (fewer where a batch has fewer patches), or in as few as fit the device.

    For the latter stages are compiled, those of the most voxels first, until one fits as a whole: what has fewer voxels fits too.
    """
    wanted = run.config.accumulate
    device = open_device(tuple(stages), run.config.network.precision)
    parts = {stage: 1 for stage in stages}
    if wanted == "auto":
        graphdef, state = initial_state(run, device)
        lower = stage_lowering(run, device, graphdef, state)
        del state
        for stage in sorted(stages, key=lambda s: s.voxels, reverse=True):
            parts[stage] = fewest_parts(run, device, lower, stage)
            if parts[stage] == 1:
                break
    else:
        parts = {stage: parts_at_least(stage.batch_size, wanted, device.count) for stage in stages}
    chosen = [dataclasses.replace(stage, parts=parts[stage]) for stage in stages]
    for stage in chosen:
        if stage.parts > 1:
            say(f"patch {stage}")
    return chosen


def fewest_parts(run: Experiment, device: Device, lower: Callable[[Stage], jax.stages.Lowered], stage: Stage) -> int:
    """The fewest parts with which a stage's program fits the device; as many as there can be if none does."""
    budget, options = device_budget(run.config.curriculum.memory_fraction), program_options(run, device)
    while True:
        try:
            needed = program_bytes(lower(stage).compile(options)) + waiting_bytes(run, device, stage)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            needed = math.inf
        more = parts_at_least(stage.batch_size, stage.parts + 1, device.count)
        if needed <= budget or more <= stage.parts:
            return stage.parts
        stage = dataclasses.replace(stage, parts=more)


def seconds_by_voxels(run: Experiment, stages: Sequence[Stage]) -> Callable[[Stage], float]:
    """Seconds per step of any stage, on the line by voxels through the smallest and the largest of `stages`, which are measured."""
    device = open_device(tuple(stages), run.config.network.precision)
    smallest, largest = min(stages, key=lambda s: s.voxels), max(stages, key=lambda s: s.voxels)
    ends = [smallest, largest] if smallest.voxels < largest.voxels else [largest]
    voxels, seconds = [stage.voxels for stage in ends], [seconds_per_step(run, device, stage) for stage in ends]
    return lambda stage: float(np.interp(stage.voxels, voxels, seconds))


def seconds_per_step(run: Experiment, device: Device, stage: Stage) -> float:
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


def steps_that_fit(run: Experiment, make: Callable[[int], Schedule], estimate: Callable[[Stage], float], say: Callable[[str], None]) -> int:
    """The most steps whose schedule, and the validation of its epochs, fit `max_hours`."""
    config = run.config
    longest, step = config.epochs * config.steps_per_epoch, estimate(planned_stage(run))
    validation = FORWARD_SHARE * config.validation_steps * step
    budget = SHARE_OF_STEPS * 3600 * config.max_hours
    steps = fit_to_seconds(make, lambda stage: estimate(stage) + validation / config.steps_per_epoch, budget,
                           config.steps_per_epoch, longest)
    first = estimate(min(run.schedule.stages, key=lambda stage: stage.voxels))
    say(f"{steps} of {longest} steps fit {config.max_hours:g} hours ({first:.3g} s per step in the smallest stage, {step:.3g} s at the "
        f"planned patch, about {validation:.3g} s of validation per epoch)")
    return steps


def planned_stage(run: Experiment) -> Stage:
    """The patches with which epochs are validated."""
    return Stage(0, run.configuration.patch_size, run.configuration.batch_size)


def in_time(run: Experiment, meter: Meter, done: int, saved: Callable[[], bool], say: Callable[[str], None]) -> Experiment:
    """Stretch or shorten what is left of the schedule so that the time budget is kept; the same run if it is close enough.

    The learning rates of all steps change with the length, so a changed schedule is stored only once `saved` has brought the
    checkpoint of the step to disk: none must be resumed that went on under the schedule before. Where that fails the run
    stays as it is.
    """
    if done >= run.num_steps:
        return run
    left = SHARE_OF_STEPS * 3600 * run.config.max_hours - meter.seconds_spent()
    validation = meter.seconds_per_validation()
    if validation is None:
        validation = FORWARD_SHARE * run.config.validation_steps * meter.seconds_per_step(planned_stage(run))
    schedule = rescale_rest(run.schedule, done, lambda stage: meter.seconds_per_step(stage) + validation / run.config.steps_per_epoch,
                            max(left, 0.0), run.config.epochs * run.config.steps_per_epoch)
    if abs(schedule.num_steps - run.num_steps) < max(1, WORTH_CORRECTING * run.num_steps) or not saved():
        return run
    corrected = with_schedule(run, schedule)
    store_schedule(corrected)
    say(f"{run.num_steps} steps were planned; {corrected.num_steps} keep the budget of {run.config.max_hours:g} hours")
    return corrected


def note_on_devices(schedule: Schedule, devices: int) -> str | None:
    """A sentence for batches that cannot be shared by all devices, so that some stay idle."""
    sizes = [stage.batch_size // stage.parts for stage in schedule.stages]
    count = math.gcd(devices, *sizes)
    if count == devices:
        return None
    odd = ", ".join(str(size) for size in dict.fromkeys(sizes) if size % devices)
    return (f"note: {count} of {devices} devices will be used, because batches of {odd} patches cannot be divided among all; let them be "
            f"multiples of {devices}: --batch-policy device-memory, or --batch-policy planned with such a --batch-size")
