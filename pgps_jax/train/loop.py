"""train(run): the training loop. It reads like a table of contents; the work is in the files that it names."""

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgps_jax.curriculum import Schedule, Stage
from pgps_jax.data.pipeline import PatchBatch, PatchStream
from pgps_jax.errors import InputError
from pgps_jax.host_memory import peak_bytes
from pgps_jax.json_file import read_json, write_json
from pgps_jax.report.environment import differences, environment
from pgps_jax.report.health_summary import health_lines, health_summary
from pgps_jax.report.progress import CaseProgress, plot_progress
from pgps_jax.report.run_log import RunLog
from pgps_jax.report.schedule import schedule_table, stage_rows
from pgps_jax.train.checkpoint import LAST_WAITS, STOP_WAITS, Checkpoints
from pgps_jax.train.device import Device, open_device, put
from pgps_jax.train.forecast import forecast
from pgps_jax.train.health import NotFinite, SkippedSteps, StageTooLarge, memory_errors_of
from pgps_jax.train.meter import STEPS_BEFORE_FORECAST, Meter
from pgps_jax.train.online_validation import OnlineValidation
from pgps_jax.train.programs import ProgramTiming, StagePrograms, stages_from
from pgps_jax.train.recovery import last_good, skip_batch, with_smaller_batch
from pgps_jax.train.setup import initial_state, open_stream, stage_programs
from pgps_jax.train.sizing import in_time
from pgps_jax.train.state import TrainState, abstract
from pgps_jax.train.stopping import StopRequest
from pgps_jax.workspace import Experiment

STAGES_AHEAD = 2  # whose programs are made while a stage trains: early stages can be shorter than one compilation


class Stopped(Exception):
    """The run was asked to stop; everything needed to go on is saved."""


class Session(NamedTuple):
    """What stays as it is from the start of a training process to its end."""

    device: Device
    programs: StagePrograms
    checkpoints: Checkpoints
    log: RunLog
    stop: StopRequest


def train(run: Experiment, spoken: Sequence[str] = ()) -> None:
    """Train from where the run folder stands to the end of the schedule.

    `spoken` are lines about the run that were said before it had a log. Raises Stopped after a stop on request. The state
    is saved under checkpoints/last either way.
    """
    device = open_device(run.schedule.stages, run.config.network.precision)
    graphdef, state = initial_state(run, device)
    said: list[str] = []
    with Checkpoints(run.folder / "checkpoints", said.append, run.config.keep_checkpoints) as checkpoints, StopRequest(run.folder) as stop:
        state = checkpoints.restore(abstract(state, device.whole)) or state
        log = RunLog(run.folder, int(state.step))
        checkpoints.say = log.say
        for line in said:
            log.say(line)
        if int(state.step) == run.num_steps:
            log.close()
            return
        begin(run, device, int(state.step), log, spoken)
        try:
            with stage_programs(run, device, graphdef, state) as programs:
                session = Session(device, programs, checkpoints, log, stop)
                run = with_forecast(session, run, state)
                online = OnlineValidation(run, device, graphdef)
                while int(state.step) < run.num_steps:
                    try:
                        state, run = run_steps(session, run, state, online)
                    except StageTooLarge as error:
                        programs.drop(error.stage)
                        run = with_smaller_batch(run, error, device, log)
                        online = OnlineValidation(run, device, graphdef)
                        state = last_good(run, device, state, checkpoints, log)
                    except NotFinite as error:
                        skip_batch(run, device, error.step, log)
                        state = last_good(run, device, state, checkpoints, log)
        finally:
            draw(run, log)
            sum_up(run, log)
            log.close()


# --------------------------------------------------------------------------------------------- before the first step, after the last


def begin(run: Experiment, device: Device, step: int, log: RunLog, spoken: Sequence[str]) -> None:
    """Say where the run stands, and what of its environment is not as it was when it was started."""
    changes = differences(read_json(run.folder / "environment.json"), environment()) if step else []
    log.event("start", step=step, environment_changes=changes)
    for line in spoken:
        log.note(line)
        log.event("note", text=line)
    log.say(f"{run.folder}: step {step} of {run.num_steps} on {device.count} x {device.platform}, {np.dtype(device.dtype).name}, "
            f"{len(run.train_ids)} cases to train, {len(run.validation_ids)} to validate")
    if changes:
        log.say(f"note: not as at the run's start: {'; '.join(changes)}")


def with_forecast(session: Session, run: Experiment, state: TrainState) -> Experiment:
    """The run, after its stages and the memory that they will need have been said.

    A stage that already the compiler finds too large has a smaller batch from here on.
    """
    log = session.log
    while True:
        try:
            stages = forecast(run, session.device, state, session.programs, log.say)
            break
        except StageTooLarge as error:
            run = with_smaller_batch(run, error, session.device, log)
    log.event("forecast", device_bytes=[s.device_bytes for s in stages], host_bytes=[s.host_bytes for s in stages])
    rows = stage_rows(run.schedule, run.configuration.patch_size, run.configuration.batch_size, {s.stage: s.device_bytes for s in stages})
    log.show(schedule_table(rows, f"{run.config.curriculum.mode}, {run.num_steps} steps"))
    return run


def draw(run: Experiment, log: RunLog) -> None:
    """Write progress.png."""
    stages = run.schedule.stages
    volume = np.array([math.prod(stage.patch_size) for stage in stages])[run.schedule.stage_of_step]
    batch = np.array([stage.batch_size for stage in stages])[run.schedule.stage_of_step]
    try:
        plot_progress(log.records, run.folder / "progress.png", volume, batch)
    except OSError as error:
        log.say(f"warning: progress.png cannot be written ({error})")


def sum_up(run: Experiment, log: RunLog) -> None:
    """Write health.json, and say how the run went when it is at its end."""
    summary = health_summary(log.records, log.events, peak_bytes())
    try:
        write_json(run.folder / "health.json", summary)
    except OSError as error:
        log.say(f"warning: health.json cannot be written ({error})")
    if summary["steps"] + len(summary["skipped_steps"]) == run.num_steps:
        for line in health_lines(summary):
            log.say(line)


# ----------------------------------------------------------------------------------------------------------------------------- steps


def run_steps(session: Session, run: Experiment, state: TrainState, online: OnlineValidation) -> tuple[TrainState, Experiment]:
    """Every step from the state's to the last; what to do after a step is decided from the step number alone.

    Returns early, with another schedule for what is left, when a time budget has to be corrected at the end of a stage, or of an
    epoch of the last one.
    Raises StageTooLarge when the device runs out of memory, NotFinite when a loss is not, Stopped when asked to stop.
    """
    first, meter, starts = int(state.step), Meter(session.log, run.schedule), run_starts(run.schedule)
    skipped, entered = SkippedSteps(run.folder), set[Stage]()
    make_up_for_best(session, run, state, meter)
    with open_stream(run, session.device, first, session.log.stalled) as batches, CaseProgress("training") as progress:
        for done in range(first + 1, run.num_steps + 1):
            stage = run.schedule.stage_at(done - 1)
            with memory_errors_of(stage):
                state = take_step(session, run, state, batches, meter, skipped, entered)
                online.prepare(run, state.params)
                progress(done, run.num_steps, f"{stage}  {meter.latest}", partial(meter.seconds_left, done - 1))
                if meter.steps_in_stage == STEPS_BEFORE_FORECAST:
                    session.log.say(f"  {meter.forecast(done - 1)}")
                corrected = after_step(session, run, state, meter, online, starts, done)
            if corrected is not run:
                return state, corrected
    return state, run


def take_step(session: Session, run: Experiment, state: TrainState, batches: PatchStream, meter: Meter, skipped: SkippedSteps,
              entered: set[Stage]) -> TrainState:
    """The step of the next batch. The first one of a stage waits for the stage's program, and says what both took."""
    step = batches.step
    stage = run.schedule.stage_at(step)
    is_first = stage not in entered and step not in skipped
    if is_first:
        meter.settle()
        timing = enter_stage(session, run, step)
        meter.resume_clock()
    batch = next_batch(session, state, batches, meter)
    if step in skipped:
        return state._replace(step=state.step + 1)
    began = time.perf_counter()
    state, metrics = session.programs.get(stage)(state, put(batch, session.device), run.learning_rates[step])
    meter.note(step, metrics, batches.waited_seconds)
    if is_first:
        meter.settle()
        timing = timing._replace(first_step_seconds=time.perf_counter() - began)
        session.log.record("stage", step, **timing.record())
        session.log.say(str(timing))
        entered.add(stage)
    return state


def enter_stage(session: Session, run: Experiment, step: int) -> ProgramTiming:
    """Wait for the program of the stage that a step is the first of, have the next ones made, let go of those that are done."""
    coming = stages_from(run.schedule, step)
    stretches = 1 + np.count_nonzero(np.diff(run.schedule.stage_of_step[step:]))
    session.programs.keep(coming)
    one_by_one = stretches == len(coming)  # otherwise stages come back, and all are soon needed
    session.programs.prefetch(*(coming[:1 + STAGES_AHEAD] if one_by_one else coming))
    return session.programs.timing(coming[0])


def next_batch(session: Session, state: TrainState, batches: PatchStream, meter: Meter) -> PatchBatch:
    """The next batch; when the data are out of reach, what has been trained is saved before that is raised."""
    try:
        return next(batches)
    except InputError:
        meter.settle()
        finish(session, state, meter, STOP_WAITS)
        raise


def after_step(session: Session, run: Experiment, state: TrainState, meter: Meter, online: OnlineValidation, starts: dict[int, int],
               done: int) -> Experiment:
    """Do what is due after `done` steps: validation, checkpoints, the end, a stop. Returns the run to go on with."""
    best, at_end, at_epoch = False, done == run.num_steps, done % run.config.steps_per_epoch == 0
    if at_end or at_epoch:
        meter.settle()
        best = online(run, state.params, meter, session.log, done)
        draw(run, session.log)
        meter.resume_clock()
    reason = session.stop.reason or ("notice of pre-emption" if session.checkpoints.preempted(done) else None)
    if best or done in starts or at_end or reason or session.checkpoints.due(run.config.checkpoint_minutes):
        meter.settle()
        save(session, state, meter, ("best", "last") if best else ("last",))
        meter.resume_clock()
    if at_end:
        save_end(session, run, state, meter)
    elif reason:
        stop(session, run, state, meter, reason)
    elif run.config.max_hours is not None and (done in starts or (at_epoch and done > max(starts, default=0))):
        return in_time(run, meter, done, partial(finish, session, state, meter, STOP_WAITS), session.log.say)
    return run


def run_starts(schedule: Schedule) -> dict[int, int]:
    """First step of each stretch of one stage -> its stage index; empty where a stage comes back (RPSS)."""
    stretches = schedule.runs()
    in_use = {stage for stage, _, _ in stretches}
    return {first: stage.index for stage, first, _ in stretches} if len(stretches) == len(in_use) else {}


# ------------------------------------------------------------------------------------------------------------------------ checkpoints


def save(session: Session, state: TrainState, meter: Meter, names: tuple[str, ...]) -> bool:
    """Start saving the state under the names; False when that cannot be done now, which is said."""
    done = int(state.step)
    if error := session.log.flush():  # the records of these steps must be on disk before the checkpoint that counts on them
        session.checkpoints.not_saved(done, error)
        return False
    kept = jax.tree.map(jnp.copy, state)  # the next step donates `state` while orbax still reads it
    description = {"step": done, "pseudo_dice_ema": meter.best_ema()}
    return all([session.checkpoints.save(name, kept, done, description) for name in names])


def finish(session: Session, state: TrainState, meter: Meter, waits: tuple[float, ...]) -> bool:
    """Save the state and wait until it is on disk; while that fails, try again after each of `waits` seconds."""
    for wait in (*waits, None):
        if save(session, state, meter, ("last",)) and session.checkpoints.finish():
            return True
        if wait is not None:
            session.log.say(f"trying again in {wait:g} s")
            time.sleep(wait)
    return False


def make_up_for_best(session: Session, run: Experiment, state: TrainState, meter: Meter) -> None:
    """Save the best state where a kill came between the saves of last and best."""
    step = int(state.step)
    if meter.best_step() == step and not session.checkpoints.has("best", step):
        with memory_errors_of(run.schedule.stage_at(step)):
            save(session, state, meter, ("best",))


def save_end(session: Session, run: Experiment, state: TrainState, meter: Meter) -> None:
    """Save the state at the end of the run; InputError when that cannot be done for long."""
    if not finish(session, state, meter, LAST_WAITS):
        raise InputError(f"{run.folder}: training is done, but its end could not be saved there; make the folder writable and start the "
                         "same command again, which goes on from the last checkpoint")


def stop(session: Session, run: Experiment, state: TrainState, meter: Meter, reason: str) -> None:
    """Save the state, say who asked, and raise Stopped."""
    saved, done = finish(session, state, meter, STOP_WAITS), int(state.step)
    session.log.event("stopped", step=done, reason=reason)
    session.log.say(f"stopped by {reason} after step {done} of {run.num_steps}; the same command goes on from "
                    f"{'here' if saved else 'the last checkpoint'}")
    raise Stopped(reason)
