"""Pseudo-Dice on validation patches at the end of an epoch: one compiled program at the planned patch, for every mode."""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor

import jax
from flax import nnx
from jaxtyping import PyTree

from pgps_jax.curriculum import Stage
from pgps_jax.data.pipeline import PatchStream, validation_source
from pgps_jax.report.run_log import RunLog
from pgps_jax.train.device import Device, abstract_batch, put
from pgps_jax.train.health import concern, memory_errors_of
from pgps_jax.train.meter import Meter
from pgps_jax.train.setup import program_options
from pgps_jax.train.state import abstract
from pgps_jax.train.step import ValidationCounts, make_validation_step
from pgps_jax.workspace import Experiment


class OnlineValidation:
    """Call it at the end of an epoch; it records the epoch and tells whether its moving average is the best so far.

    Batches are the planned ones, unless training has to take smaller ones, or parts of them, of the planned patch: make
    another one when that changes. When memory does not suffice here, it is that stage which is too large (StageTooLarge).
    """

    def __init__(self, run: Experiment, device: Device, graphdef: nnx.GraphDef):
        self._device, self._trained = device, max(run.schedule.stages, key=lambda stage: math.prod(stage.patch_size))
        stage = validation_stage(self._trained, run.configuration.batch_size, device.count)
        self._source = validation_source(
            run.store, run.validation_ids, stage, run.config.sampling, seed=run.config.seed,
            num_batches=run.config.epochs * run.config.validation_steps, image_dtype=device.transport, label_dtype=run.label_dtype)
        self._batch = abstract_batch(device, stage.batch_size, stage.patch_size, run.channels, run.label_dtype)
        self._step = jax.jit(make_validation_step(graphdef, run.labels, run.configuration.batch_dice, stage.parts))
        self._program: Future | None = None

    def prepare(self, run: Experiment, params: PyTree) -> None:
        """Start making the program in the background, unless that has been done."""
        if self._program is None:
            shapes = abstract(params, self._device.whole)
            maker = ThreadPoolExecutor(1, thread_name_prefix="compile")
            self._program = maker.submit(lambda: self._step.lower(shapes, self._batch).compile(program_options(run, self._device)))
            maker.shutdown(wait=False)

    def __call__(self, run: Experiment, params: PyTree, meter: Meter, log: RunLog, done: int) -> bool:
        """Validate after `done` steps."""
        began, per_epoch = time.perf_counter(), run.config.steps_per_epoch
        epoch = (done - 1) // per_epoch
        with memory_errors_of(self._trained):
            counts = self._counts(run, params, epoch, log)
        best_before = meter.best_ema()
        record = meter.epoch(epoch, epoch * per_epoch, done - 1, float(run.learning_rates[done - 1]),
                             counts, time.perf_counter() - began)
        log.say(_line(record, run))
        if worry := concern(log.of_kind("epoch")):
            log.say(worry)
        return (record["pseudo_dice_ema"] or 0) > best_before

    def _counts(self, run: Experiment, params: PyTree, epoch: int, log: RunLog) -> list[ValidationCounts]:
        """Of each validation batch of an epoch."""
        self.prepare(run, params)
        program, first, counts = self._program.result(), epoch * run.config.validation_steps, []
        stop = first + run.config.validation_steps
        with PatchStream(self._source, first, stop=stop, threads=run.config.threads, say=log.stalled) as batches:
            for batch in batches:
                counts.append(program(params, put(batch, self._device)))
                jax.block_until_ready(counts[-3:-2])  # so that no more than two batches wait on the device
        return jax.device_get(counts)


def validation_stage(trained: Stage, planned_batch: int, devices: int) -> Stage:
    """Patch, batch and parts of validation, from the stage that trains the planned patch: the planned batch, or as much of it as
    that stage takes and the devices can share."""
    if trained.batch_size <= planned_batch:
        return Stage(0, trained.patch_size, trained.batch_size, trained.parts)
    return Stage(0, trained.patch_size, max(planned_batch // devices, 1) * devices)


def _line(record: dict, run: Experiment) -> str:
    """The epoch in one line, with the names of the classes."""
    names = {value: name for name, value in zip(run.labels.names, run.labels.values, strict=True)}
    dice = "  ".join(f"{names[value]} {'not sampled' if d is None else f'{d:.3f}'}"
                     for value, d in zip(run.labels.foreground, record["pseudo_dice"], strict=True))
    wait = 100 * record["input_wait_seconds"] / max(record["seconds"], 1e-9)
    loss = "not finite" if record["train_loss"] is None else f"{record['train_loss']:.3f}"
    epochs = math.ceil(run.num_steps / run.config.steps_per_epoch)  # a time budget makes them fewer than asked for
    return (f"epoch {record['epoch'] + 1} of {epochs}: loss {loss}, pseudo-Dice {dice}, "
            f"{record['seconds']:.1f} s, input wait {wait:.0f} %")
