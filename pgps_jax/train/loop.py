"""train(run): the training loop. It reads like a table of contents; the work is in the files that it names."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from pgps_jax.curriculum import Schedule
from pgps_jax.errors import InputError
from pgps_jax.host_memory import peak_bytes
from pgps_jax.json_file import read_json, write_json
from pgps_jax.report.environment import differences, environment
from pgps_jax.report.health_summary import health_lines, health_summary
from pgps_jax.report.progress import plot_progress, progress_bar
from pgps_jax.report.run_log import RunLog
from pgps_jax.train.checkpoint import LAST_WAITS, STOP_WAITS, Checkpoints
from pgps_jax.train.device import Device, open_device, put
from pgps_jax.train.forecast import forecast
from pgps_jax.train.health import NotFinite, SkippedSteps
from pgps_jax.train.meter import STEPS_BEFORE_FORECAST, Meter
from pgps_jax.train.online_validation import OnlineValidation
from pgps_jax.train.programs import StagePrograms
from pgps_jax.train.recovery import StageTooLarge, last_good, memory_errors_of, skip_batch, with_smaller_batch
from pgps_jax.train.setup import initial_state, open_stream, stage_programs
from pgps_jax.train.sizing import in_time
from pgps_jax.train.state import TrainState, abstract
from pgps_jax.train.stopping import StopRequest
from pgps_jax.workspace import Experiment

STAGES_AHEAD = 2  # whose programs are made while a stage trains: early stages can be shorter than one compilation


class Stopped(Exception):
    """The run was asked to stop; everything needed to go on is saved."""


def train(run: Experiment) -> None:
    """Train from where the run folder stands to the end of the schedule.

    Raises Stopped after a stop on request. The state is saved under checkpoints/last either way.
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
        begin(run, device, int(state.step), log)
        try:
            with stage_programs(run, device, graphdef, state) as programs:
                stages = forecast(run, device, state, programs, log.say)
                log.event("forecast", device_bytes=[s.device_bytes for s in stages], host_bytes=[s.host_bytes for s in stages])
                online = OnlineValidation(run, device, graphdef)
                while int(state.step) < run.num_steps:
                    try:
                        state, run = _run_steps(run, device, state, programs, online, log, checkpoints, stop)
                    except StageTooLarge as error:
                        run = with_smaller_batch(run, error, device, log)
                        state = last_good(run, device, state, checkpoints, log)
                    except NotFinite as error:
                        skip_batch(run, device, error.step, log)
                        state = last_good(run, device, state, checkpoints, log)
        finally:
            draw(run, log)
            sum_up(run, log)
            log.close()


def begin(run: Experiment, device: Device, step: int, log: RunLog) -> None:
    """Say where the run stands, and what of its environment is not as it was when it was started."""
    changes = differences(read_json(run.folder / "environment.json"), environment()) if step else []
    log.event("start", step=step, environment_changes=changes)
    log.say(f"{run.folder}: step {step} of {run.num_steps} on {device.count} x {device.platform}, {np.dtype(device.dtype).name}, "
            f"{len(run.train_ids)} cases to train, {len(run.validation_ids)} to validate")
    if changes:
        log.say(f"note: not as at the run's start: {'; '.join(changes)}")


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


def _run_steps(run: Experiment, device: Device, state: TrainState, programs: StagePrograms, online: OnlineValidation, log: RunLog,
               checkpoints: Checkpoints, stop: StopRequest) -> tuple[TrainState, Experiment]:
    """Every step from the state's to the last; what to do after a step is decided from the step number alone.

    Returns early, with another schedule for what is left, when a time budget has to be corrected at the end of a stage.
    Raises StageTooLarge when the device runs out of memory, Stopped when asked to stop.
    """
    first, per_epoch = int(state.step), run.config.steps_per_epoch
    meter, starts, skipped = Meter(log, run.schedule), run_starts(run.schedule), SkippedSteps(run.folder)
    if meter.best_step() == first and not checkpoints.has("best", first):
        save(checkpoints, log, state, meter, ("best",))  # a kill came between the saves of last and best
    with open_stream(run, device, first, log.stalled) as batches, progress_bar() as bar:
        task = bar.add_task("training", total=run.num_steps, completed=first, note="")
        for step in range(first, run.num_steps):
            stage = run.schedule.stage_at(step)
            with memory_errors_of(stage):
                if step == first or step in starts:
                    meter.settle()
                    enter_stage(run, log, programs, step, starts)
                    meter.resume_clock()
                try:
                    batch = next(batches)
                except InputError:  # the data are out of reach; what has been trained is not
                    meter.settle()
                    finish(checkpoints, log, state, meter, STOP_WAITS)
                    raise
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
            reason = stop.reason or ("notice of pre-emption" if checkpoints.preempted(done) else None)
            if best or done in starts or done == run.num_steps or reason or checkpoints.due(run.config.checkpoint_minutes):
                meter.settle()
                save(checkpoints, log, state, meter, ("best", "last") if best else ("last",))
                meter.resume_clock()
            if done == run.num_steps and not finish(checkpoints, log, state, meter, LAST_WAITS):
                raise InputError(f"{run.folder}: training is done, but its end could not be saved there; make the folder writable and "
                                 "start the same command again, which goes on from the last checkpoint")
            if reason and done < run.num_steps:
                saved = finish(checkpoints, log, state, meter, STOP_WAITS)
                log.event("stopped", step=done, reason=reason)
                log.say(f"stopped by {reason} after step {done} of {run.num_steps}; the same command goes on from "
                        f"{'here' if saved else 'the last checkpoint'}")
                raise Stopped(reason)
            if done in starts and run.config.max_hours is not None:
                corrected = in_time(run, meter, done, log.say)
                if corrected is not run:
                    return state, corrected
    return state, run


def run_starts(schedule: Schedule) -> dict[int, int]:
    """First step of each stretch of one stage -> its stage index; empty where stages change at random (RPSS)."""
    stretches = schedule.runs()
    return {} if len(stretches) > len(schedule.stages) else {first: stage.index for stage, first, _ in stretches}


def enter_stage(run: Experiment, log: RunLog, programs: StagePrograms, step: int, starts: dict[int, int]) -> None:
    """Get the program of the stage that begins, say what it cost, and have the next ones made in the background."""
    stage = run.schedule.stage_at(step)
    if not starts:
        programs.prefetch_all(run.schedule.stages)
    for first in [step, *(first for first in sorted(starts) if first > step)][:1 + STAGES_AHEAD]:
        programs.prefetch(run.schedule.stage_at(first))
    programs.get(stage)
    timing = programs.timing(stage)
    log.record("stage", step, **timing.record())
    log.say(str(timing))
    earlier = [first for first in sorted(starts) if first < step]
    if earlier:
        programs.drop(run.schedule.stage_at(earlier[-1]))


def save(checkpoints: Checkpoints, log: RunLog, state: TrainState, meter: Meter, names: tuple[str, ...]) -> bool:
    """Start saving the state under the names; False when that cannot be done now, which is said."""
    done = int(state.step)
    if error := log.flush():  # the records of these steps must be on disk before the checkpoint that counts on them
        checkpoints.not_saved(done, error)
        return False
    kept = jax.tree.map(jnp.copy, state)  # the next step donates `state` while orbax still reads it
    description = {"step": done, "pseudo_dice_ema": meter.best_ema()}
    return all([checkpoints.save(name, kept, done, description) for name in names])


def finish(checkpoints: Checkpoints, log: RunLog, state: TrainState, meter: Meter, waits: tuple[float, ...]) -> bool:
    """Save the state and wait until it is on disk; while that fails, try again after each of `waits` seconds."""
    for wait in (*waits, None):
        if save(checkpoints, log, state, meter, ("last",)) and checkpoints.finish():
            return True
        if wait is not None:
            log.say(f"trying again in {wait:g} s")
            time.sleep(wait)
    return False


def draw(run: Experiment, log: RunLog) -> None:
    """Write progress.png."""
    stages = run.schedule.stages
    volume = np.array([math.prod(stage.patch_size) for stage in stages])[run.schedule.stage_of_step]
    batch = np.array([stage.batch_size for stage in stages])[run.schedule.stage_of_step]
    try:
        plot_progress(log.records, run.folder / "progress.png", volume, batch)
    except OSError as error:
        log.say(f"warning: progress.png cannot be written ({error})")
