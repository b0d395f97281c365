"""train(run): the training loop. It reads like a table of contents; the work is in the files that it names."""

import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from pgps_jax.curriculum import Schedule, Stage
from pgps_jax.data.pipeline import PatchStream, stream
from pgps_jax.models import build, lowest_head
from pgps_jax.models.conv import compiler_options
from pgps_jax.report.progress import plot_progress, progress_bar
from pgps_jax.report.run_log import RunLog
from pgps_jax.train.augment import crop_size
from pgps_jax.train.checkpoint import Checkpoints
from pgps_jax.train.device import Device, abstract_batch, open_device, put
from pgps_jax.train.meter import STEPS_BEFORE_FORECAST, Meter
from pgps_jax.train.online_validation import OnlineValidation
from pgps_jax.train.optim import make_optimizer
from pgps_jax.train.programs import StagePrograms
from pgps_jax.train.state import TrainState, abstract, init_state, split
from pgps_jax.train.step import make_train_step
from pgps_jax.train.stopping import StopRequest
from pgps_jax.workspace import Experiment


class Stopped(Exception):
    """The run was asked to stop; everything needed to go on is saved."""


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
        try:
            if int(state.step) < run.num_steps:
                log.say(f"{run.folder}: step {int(state.step)} of {run.num_steps} on {device.count} x {device.platform}, "
                        f"{np.dtype(device.dtype).name}, {len(run.train_ids)} cases to train, {len(run.validation_ids)} to validate")
                _run_steps(run, device, graphdef, state, log, checkpoints, stop)
        finally:
            draw(run, log)
            log.close()


def _run_steps(run: Experiment, device: Device, graphdef: nnx.GraphDef, state: TrainState, log: RunLog,
               checkpoints: Checkpoints, stop: StopRequest) -> None:
    """Every step from the state's to the last; what to do after a step is decided from the step number alone."""
    first, per_epoch = int(state.step), run.config.steps_per_epoch
    meter, online = Meter(log, run.schedule), OnlineValidation(run, device, graphdef)
    starts = run_starts(run.schedule)
    saved_at = time.monotonic()
    with (stage_programs(run, device, graphdef, state) as programs, open_stream(run, device, first, log.say) as batches,
          progress_bar() as bar):
        task = bar.add_task("training", total=run.num_steps, completed=first, note="")
        for step in range(first, run.num_steps):
            stage = run.schedule.stage_at(step)
            if step == first or step in starts:
                meter.settle()
                enter_stage(run, log, programs, step, starts)
                meter.resume_clock()
            batch = next(batches)
            state, metrics = programs.get(stage)(state, put(batch, device), run.learning_rates[step])
            meter.note(step, metrics, batches.waited_seconds)
            bar.update(task, completed=step + 1, note=f"{stage}  {meter.latest}")
            if meter.steps_in_stage == STEPS_BEFORE_FORECAST:
                log.say(f"  {meter.forecast(step)}")

            done, best = step + 1, False
            if done % per_epoch == 0 or done == run.num_steps:
                meter.settle()
                best = online(state.params, meter, log, done)
                draw(run, log)
                meter.resume_clock()
            overdue = time.monotonic() - saved_at > 60 * run.config.checkpoint_minutes
            if best or overdue or done in starts or done == run.num_steps or stop.reason:
                meter.settle()
                save(checkpoints, log, state, done, best, meter.best_ema())
                saved_at = time.monotonic()
                meter.resume_clock()
            if stop.reason and done < run.num_steps:
                log.say(f"stopped by {stop.reason} after step {done} of {run.num_steps}; the same command goes on from here")
                raise Stopped(stop.reason)


def run_starts(schedule: Schedule) -> dict[int, int]:
    """First step of each stretch of one stage -> its stage index; empty where stages change at random (RPSS)."""
    stretches = schedule.runs()
    return {} if len(stretches) > len(schedule.stages) else {first: stage.index for stage, first, _ in stretches}


def initial_state(run: Experiment, device: Device) -> tuple[nnx.GraphDef, TrainState]:
    """Structure of the network, and the state before the first step (the same for the same seed)."""
    network = build(run.configuration.architecture, run.channels, run.labels.num_outputs,
                    dtype=device.dtype, rngs=nnx.Rngs(run.config.seed))
    graphdef, params = split(network)
    return graphdef, jax.device_put(init_state(params, optimizer_of(run)), device.whole)


def optimizer_of(run: Experiment) -> optax.GradientTransformation:
    """The optimizer; the head that deep supervision gives no weight stays as it is, as in nnU-Net."""
    return make_optimizer(run.config.optim, lowest_head(run.configuration.architecture))


def stage_programs(run: Experiment, device: Device, graphdef: nnx.GraphDef, state: TrainState) -> StagePrograms:
    """The compiled training step of every stage, made when asked for or ahead of time."""
    optimizer = optimizer_of(run)
    abstract_state = abstract(state, device.whole)

    def lower(stage: Stage) -> jax.stages.Lowered:
        step = make_train_step(graphdef, optimizer, run.labels, run.configuration.batch_dice, run.policy, stage.patch_size,
                               run.config.seed)
        batch = abstract_batch(device, stage.batch_size, crop_size(run.policy, stage.patch_size), run.channels, run.label_dtype)
        return jax.jit(step, donate_argnums=0).lower(abstract_state, batch, jax.ShapeDtypeStruct((), jnp.float32))

    return StagePrograms(lower, compiler_options(device.platform))


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
    """Batches from `first_step` on, read and cropped by threads."""
    crops = [crop_size(run.policy, stage.patch_size) for stage in run.schedule.stages]
    return stream(run.store, run.train_ids, run.schedule, run.config.sampling, crops, run.configuration.batch_size,
                  seed=run.config.seed, first_step=first_step, threads=run.config.threads, image_dtype=device.transport,
                  label_dtype=run.label_dtype, say=say)


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
