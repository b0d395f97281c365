"""train(run): the training loop. It reads like a table of contents; the work is in the files that it names."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

from pgps_jax.curriculum import Schedule, Stage
from pgps_jax.data.pipeline import PatchSource, PatchStream
from pgps_jax.errors import InputError
from pgps_jax.pacing import rescale_rest
from pgps_jax.report.progress import plot_progress, progress_bar
from pgps_jax.report.run_log import RunLog
from pgps_jax.train.augment import crop_size
from pgps_jax.train.checkpoint import Checkpoints
from pgps_jax.train.device import Device, open_device, put
from pgps_jax.train.health import NotFinite, SkippedSteps, keep_batch
from pgps_jax.train.memory import is_out_of_memory
from pgps_jax.train.meter import STEPS_BEFORE_FORECAST, Meter
from pgps_jax.train.online_validation import OnlineValidation
from pgps_jax.train.programs import StagePrograms, halve_batch
from pgps_jax.train.setup import initial_state, stage_programs
from pgps_jax.train.sizing import SHARE_OF_STEPS
from pgps_jax.train.state import TrainState, abstract
from pgps_jax.train.stopping import StopRequest
from pgps_jax.workspace import Experiment, store_schedule, with_schedule

WORTH_CORRECTING = 0.03  # share by which the rest of a schedule may miss its time budget before it is changed


class Stopped(Exception):
    """The run was asked to stop; everything needed to go on is saved."""


class StageTooLarge(Exception):
    """The device ran out of memory in a stage."""

    def __init__(self, stage: Stage):
        super().__init__(str(stage))
        self.stage = stage


def train(run: Experiment) -> None:
    """Train from where the run folder stands to the end of the schedule.

    Raises Stopped after a stop on request. The state is saved under checkpoints/last either way.
    """
    device = open_device(run.schedule.stages, run.config.network.precision)
    graphdef, state = initial_state(run, device)
    said: list[str] = []
    with Checkpoints(run.folder / "checkpoints", said.append) as checkpoints, StopRequest(run.folder) as stop:
        state = checkpoints.restore(abstract(state, device.whole)) or state
        log = RunLog(run.folder, int(state.step))
        checkpoints.say = log.say
        for line in said:
            log.say(line)
        if int(state.step) < run.num_steps:
            log.say(f"{run.folder}: step {int(state.step)} of {run.num_steps} on {device.count} x {device.platform}, "
                    f"{np.dtype(device.dtype).name}, {len(run.train_ids)} cases to train, {len(run.validation_ids)} to validate")
        try:
            with stage_programs(run, device, graphdef, state) as programs:
                online = OnlineValidation(run, device, graphdef)
                while int(state.step) < run.num_steps:
                    try:
                        state, run = _run_steps(run, device, state, programs, online, log, checkpoints, stop)
                    except StageTooLarge as error:
                        run = with_smaller_batch(run, error, device, log.say)
                        state = last_good(run, device, state, checkpoints, log)
                    except NotFinite as error:
                        skip_batch(run, device, error.step, log.say)
                        state = last_good(run, device, state, checkpoints, log)
        finally:
            draw(run, log)
            log.close()


def _run_steps(run: Experiment, device: Device, state: TrainState, programs: StagePrograms, online: OnlineValidation, log: RunLog,
               checkpoints: Checkpoints, stop: StopRequest) -> tuple[TrainState, Experiment]:
    """Every step from the state's to the last; what to do after a step is decided from the step number alone.

    Returns early, with another schedule for what is left, when a time budget has to be corrected at the end of a stage.
    Raises StageTooLarge when the device runs out of memory, Stopped when asked to stop.
    """
    first, per_epoch = int(state.step), run.config.steps_per_epoch
    meter, starts, skipped = Meter(log, run.schedule), run_starts(run.schedule), SkippedSteps(run.folder)
    saved_at = time.monotonic()
    with open_stream(run, device, first, log.say) as batches, progress_bar() as bar:
        task = bar.add_task("training", total=run.num_steps, completed=first, note="")
        for step in range(first, run.num_steps):
            stage = run.schedule.stage_at(step)
            with memory_errors_of(stage):
                if step == first or step in starts:
                    meter.settle()
                    enter_stage(run, log, programs, step, starts)
                    meter.resume_clock()
                batch = next(batches)
                if step in skipped:
                    state = state._replace(step=state.step + 1)
                else:
                    state, metrics = programs.get(stage)(state, put(batch, device), run.learning_rates[step])
                    meter.note(step, metrics, batches.waited_seconds)
            bar.update(task, completed=step + 1, note=f"{stage}  {meter.latest}")
            if meter.steps_in_stage == STEPS_BEFORE_FORECAST:
                log.say(f"  {meter.forecast(step)}")

            done, best = step + 1, False
            if done % per_epoch == 0 or done == run.num_steps:
                meter.settle()
                best = online(run, state.params, meter, log, done)
                draw(run, log)
                meter.resume_clock()
            overdue = time.monotonic() - saved_at > 60 * run.config.checkpoint_minutes
            reason = stop.reason
            if best or overdue or done in starts or done == run.num_steps or reason:
                meter.settle()
                save(checkpoints, log, state, done, best, meter.best_ema())
                saved_at = time.monotonic()
                meter.resume_clock()
            if reason and done < run.num_steps:
                log.say(f"stopped by {reason} after step {done} of {run.num_steps}; the same command goes on from here")
                raise Stopped(reason)
            if done in starts and run.config.max_hours is not None:
                corrected = in_time(run, meter, done, log.say)
                if corrected is not run:
                    return state, corrected
    return state, run


@contextmanager
def memory_errors_of(stage: Stage) -> Iterator[None]:
    """Turn whatever says that the device is out of memory into StageTooLarge."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise StageTooLarge(stage) from error
        raise


def last_good(run: Experiment, device: Device, state: TrainState, checkpoints: Checkpoints, log: RunLog) -> TrainState:
    """The newest checkpoint, or the first state where there is none; the log forgets what came after it."""
    state = checkpoints.restore(abstract(state, device.whole)) or initial_state(run, device)[1]
    log.rewind(int(state.step))
    log.say(f"going on from step {int(state.step)}")
    return state


def skip_batch(run: Experiment, device: Device, step: int, say: Callable[[str], None]) -> None:
    """Keep the batch of a step whose loss or gradient is not finite for looking at, and skip the step from now on."""
    source = training_source(run, device)
    path = keep_batch(run.folder, step, source.batch_of_step(step), source.cases_of_step(step))
    say(f"loss or gradient of step {step} is not finite; its batch is kept in {path} and skipped from now on")
    SkippedSteps(run.folder).add(step)


def with_smaller_batch(run: Experiment, error: StageTooLarge, device: Device, say: Callable[[str], None]) -> Experiment:
    """The run with half the batch in the stage that was too large, from now on and on resume; raises when it has one patch."""
    try:
        run = with_schedule(run, halve_batch(run.schedule, error.stage.index, device.count))
    except ValueError as no_smaller:
        raise InputError(f"stage {error.stage.index} ({error.stage}): the device has too little memory even for one patch; "
                         "use fewer features (--network.base-features) or a device with more memory") from no_smaller
    store_schedule(run)
    say(f"out of memory in stage {error.stage.index} ({error.stage}); going on from the last checkpoint with "
        f"{run.schedule.stages[error.stage.index]}")
    return run


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


def run_starts(schedule: Schedule) -> dict[int, int]:
    """First step of each stretch of one stage -> its stage index; empty where stages change at random (RPSS)."""
    stretches = schedule.runs()
    return {} if len(stretches) > len(schedule.stages) else {first: stage.index for stage, first, _ in stretches}


def enter_stage(run: Experiment, log: RunLog, programs: StagePrograms, step: int, starts: dict[int, int]) -> None:
    """Get the program of the stage that begins, say what it cost, and start making the next one in the background."""
    stage = run.schedule.stage_at(step)
    if not starts:
        programs.prefetch_all(run.schedule.stages)
    programs.get(stage)
    timing = programs.timing(stage)
    log.record("stage", step, **timing.record())
    log.say(str(timing))
    later = [first for first in sorted(starts) if first > step]
    if later:
        programs.prefetch(run.schedule.stage_at(later[0]))
    earlier = [first for first in sorted(starts) if first < step]
    if earlier:
        programs.drop(run.schedule.stage_at(earlier[-1]))


def open_stream(run: Experiment, device: Device, first_step: int, say: Callable[[str], None]) -> PatchStream:
    """Batches from `first_step` on, read and cropped by threads or processes."""
    config = run.config
    return PatchStream(training_source(run, device), first_step, threads=config.threads, processes=config.loader_processes, say=say)


def training_source(run: Experiment, device: Device) -> PatchSource:
    """Every training batch of the run by its step."""
    crops = [crop_size(run.policy, stage.patch_size) for stage in run.schedule.stages]
    cache_bytes = int(run.config.cache_gb * 1e9) // max(run.config.loader_processes, 1)  # every process has its own
    return PatchSource(run.store, run.train_ids, run.schedule, run.config.sampling, crops, run.configuration.batch_size,
                       seed=run.config.seed, image_dtype=device.transport, label_dtype=run.label_dtype, cache_bytes=cache_bytes)


def save(checkpoints: Checkpoints, log: RunLog, state: TrainState, done: int, best: bool, ema: float) -> None:
    """Start saving the state after `done` steps."""
    log.flush()  # the records of these steps must be on disk before the checkpoint that counts on them
    kept = jax.tree.map(jnp.copy, state)  # the next step donates `state` while orbax still reads it
    for name in ("last", "best") if best else ("last",):
        checkpoints.save(name, kept, done, {"step": done, "pseudo_dice_ema": ema})


def draw(run: Experiment, log: RunLog) -> None:
    """Write progress.png."""
    stages = run.schedule.stages
    volume = np.array([math.prod(stage.patch_size) for stage in stages])[run.schedule.stage_of_step]
    batch = np.array([stage.batch_size for stage in stages])[run.schedule.stage_of_step]
    plot_progress(log.records, run.folder / "progress.png", volume, batch)
