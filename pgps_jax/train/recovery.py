"""What the loop does after a step failed: which run and which state to go on with."""

from pgps_jax.errors import InputError
from pgps_jax.report.run_log import RunLog
from pgps_jax.train.checkpoint import Checkpoints
from pgps_jax.train.device import Device
from pgps_jax.train.health import SkippedSteps, StageTooLarge, keep_batch
from pgps_jax.train.programs import halve_batch, more_parts
from pgps_jax.train.setup import initial_state, training_source
from pgps_jax.train.state import TrainState, abstract
from pgps_jax.workspace import Experiment, store_schedule, with_schedule


def last_good(run: Experiment, device: Device, state: TrainState, checkpoints: Checkpoints, log: RunLog) -> TrainState:
    """The newest checkpoint, or the first state where there is none; the log forgets what came after it."""
    state = checkpoints.restore(abstract(state, device.whole)) or initial_state(run, device)[1]
    log.rewind(int(state.step))
    log.say(f"going on from step {int(state.step)}")
    return state


def skip_batch(run: Experiment, device: Device, step: int, log: RunLog) -> None:
    """Keep the batch of a step whose loss or gradient is not finite for looking at, and skip the step from now on."""
    source = training_source(run, device)
    cases = source.cases_of_step(step)
    path = keep_batch(run.folder, step, source.batch_of_step(step), cases)
    log.say(f"loss or gradient of step {step} is not finite; its batch, of the cases {', '.join(cases)}, is kept in {path} and skipped "
            "from now on")
    log.event("skipped", step=step, cases=list(cases))
    SkippedSteps(run.folder).add(step)


def with_smaller_batch(run: Experiment, error: StageTooLarge, device: Device, log: RunLog) -> Experiment:
    """The run with half the batch in the stage that was too large, or with --accumulate auto the same batch in more parts, from
    now on and on resume; raises when it has one patch."""
    try:
        lighter = more_parts if run.config.accumulate == "auto" else halve_batch
        run = with_schedule(run, lighter(run.schedule, error.stage.index, device.count))
    except ValueError as no_smaller:
        raise InputError(f"stage {error.stage.index} ({error.stage}): the device has too little memory even for one patch; "
                         "use fewer features (--network.base-features) or a device with more memory") from no_smaller
    store_schedule(run)
    smaller = run.schedule.stages[error.stage.index]
    log.say(f"out of memory in stage {error.stage.index} ({error.stage}); going on with {smaller}")
    log.event("halved", stage=error.stage.index, batch_size=smaller.batch_size, parts=smaller.parts)
    return run
