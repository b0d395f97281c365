"""From step metrics to records: fetched one step late, so that logging never stalls the device."""

import math
import time
from collections import Counter

import numpy as np

from pgps_jax.curriculum import Schedule, Stage
from pgps_jax.host_memory import peak_bytes
from pgps_jax.report.progress import duration
from pgps_jax.report.run_log import RunLog
from pgps_jax.train.health import NotFinite, memory_errors_of
from pgps_jax.train.step import StepMetrics, ValidationCounts

EMA_KEEP = 0.9  # nnU-Net's moving average of the pseudo-Dice: 0.9 old + 0.1 new
STEPS_BEFORE_FORECAST = 10  # beside the first ones other programs are often still compiled, which doubles their time


class Meter:
    """Writes the step records of a run and sums them up by epoch and stage."""

    def __init__(self, log: RunLog, schedule: Schedule):
        self._log = log
        self._schedule = schedule
        self._pending: tuple[int, StepMetrics, float] | None = None
        self._mark = time.perf_counter()
        self._taken: Counter[int] = Counter()  # steps by stage
        self.steps_in_stage = 0  # that this meter has seen of the newest step's stage
        self.latest = ""

    def note(self, step: int, metrics: StepMetrics, waited: float) -> None:
        """Take the metrics of a step just launched (and the seconds that it waited for input); settle the one before."""
        self.settle()
        self._pending = (step, metrics, waited)
        stage = int(self._schedule.stage_of_step[step])
        self._taken[stage] += 1
        self.steps_in_stage = self._taken[stage]

    def settle(self) -> None:
        """Wait for the metrics of the last noted step and record them.

        Raises NotFinite when loss or gradient are not: before any checkpoint that would hold their update is written.
        Raises StageTooLarge, naming the stage of that step, when the device ran out of memory in it.
        """
        if self._pending is None:
            return
        step, metrics, waited = self._pending
        self._pending, stage = None, self._schedule.stage_at(step)
        with memory_errors_of(stage):
            loss, norm = float(metrics.loss), float(metrics.gradient_norm)
        now = time.perf_counter()
        self._log.record("step", step, stage=stage.index, loss=_finite(loss), gradient_norm=_finite(norm),
                         seconds=round(now - self._mark, 5), input_wait=round(waited, 5))
        self.latest = f"loss {loss:.3f}  {now - self._mark:.2f} s/step  input wait {100 * waited / max(now - self._mark, 1e-9):.0f} %"
        self._mark = now
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NotFinite(step)

    def resume_clock(self) -> None:
        """Leave out of the step times what was done since the last one (compiling, validation)."""
        self._mark = time.perf_counter()

    def last_steps(self, first_step: int) -> list[dict]:
        """Step records from `first_step` on."""
        found = []
        for record in reversed(self._log.records):
            if record["kind"] == "step":
                if record["step"] < first_step:
                    break
                found.append(record)
        return found[::-1]

    def epoch(self, epoch: int, first_step: int, last_step: int, learning_rate: float, validation: list[ValidationCounts],
              validation_seconds: float) -> dict:
        """Record an epoch: means over its steps, pseudo-Dice over its validation batches, as nnU-Net's log does.

        A class that no validation patch contains has pseudo-Dice None ("not sampled") and is left out of the mean.
        """
        steps = self.last_steps(first_step)
        tp, fp, fn = (np.sum([np.asarray(getattr(v, name), np.float64) for v in validation], axis=0) for name in ("tp", "fp", "fn"))
        total = 2 * tp + fp + fn
        dice = [float(2 * t / n) if n > 0 else None for t, n in zip(tp, total, strict=True)]
        sampled = [d for d in dice if d is not None]
        mean = float(np.mean(sampled)) if sampled else None
        before = [r["pseudo_dice_ema"] for r in self._log.of_kind("epoch") if r["pseudo_dice_ema"] is not None]
        ema = mean if not before else before[-1] if mean is None else EMA_KEEP * before[-1] + (1 - EMA_KEEP) * mean
        losses = [r["loss"] for r in steps if r["loss"] is not None]
        return self._log.record(
            "epoch", last_step, epoch=epoch, learning_rate=learning_rate,
            train_loss=float(np.mean(losses)) if losses else None,
            validation_loss=_finite(float(np.mean([float(v.loss) for v in validation]))),
            pseudo_dice=dice, pseudo_dice_mean=mean, pseudo_dice_ema=ema,
            seconds=round(sum(r["seconds"] for r in steps) + validation_seconds, 3), validation_seconds=round(validation_seconds, 3),
            input_wait_seconds=round(sum(r["input_wait"] for r in steps), 3), host_peak_bytes=peak_bytes(),
        )

    def seconds_spent(self) -> float:
        """Seconds of the run so far: steps, validation, waiting for programs; over all its sessions."""
        kinds = {"step": "seconds", "epoch": "validation_seconds", "stage": "stall_seconds"}
        return sum(r[kinds[r["kind"]]] for r in self._log.records if r["kind"] in kinds)

    def seconds_per_validation(self) -> float | None:
        """Seconds that the validation of an epoch takes; None until two were measured, because the first one compiles too."""
        taken = [record["validation_seconds"] for record in self._log.of_kind("epoch")]
        return min(taken) if len(taken) > 1 else None

    def seconds_per_step(self, stage: Stage) -> float:
        """Median over a stage's last steps.

        A stage not seen yet lies on the line by voxels through the two stages seen that are nearest to it, but never below the
        nearest one scaled by voxels if it is smaller than that. With only one seen, it costs as much per voxel.
        """
        return _seconds_per_step(self._median_seconds(), stage)

    def _median_seconds(self) -> dict[Stage, float]:
        """Of the last steps of every stage seen."""
        seen: dict[int, list[float]] = {}
        for record in self._log.of_kind("step"):
            seen.setdefault(record["stage"], []).append(record["seconds"])
        return {self._schedule.stages[index]: float(np.median(taken[-50:])) for index, taken in seen.items()}

    def best_ema(self) -> float:
        """Highest moving average of the pseudo-Dice so far; -1 before the first epoch."""
        return max((r["pseudo_dice_ema"] for r in self._log.of_kind("epoch") if r["pseudo_dice_ema"] is not None), default=-1.0)

    def best_step(self) -> int | None:
        """Steps done when the moving average of the pseudo-Dice was highest so far; None before the first epoch."""
        epochs = [r for r in self._log.of_kind("epoch") if r["pseudo_dice_ema"] is not None]
        return max(epochs, key=lambda r: r["pseudo_dice_ema"])["step"] + 1 if epochs else None

    def forecast(self, step: int) -> str:
        """Seconds per step of the running stage and the time that the rest of the run will take on this machine.

        With only one stage seen that is an upper limit, because every step has a part that does not grow with the patch.
        """
        per_step = self.seconds_per_step(self._schedule.stage_at(step))
        seen, coming = {r["stage"] for r in self._log.of_kind("step")}, np.unique(self._schedule.stage_of_step[step + 1:])
        limit = "at most" if len(seen) == 1 and len(coming) > 1 else "about"
        return f"{per_step:.3g} s per step; {limit} {duration(self.seconds_left(step))} of training are left on this machine"

    def seconds_left(self, step: int) -> float:
        """Seconds that the steps after this one will take by `seconds_per_step`; NaN before the first record of a step."""
        median = self._median_seconds()
        if not median:
            return math.nan
        counts = np.bincount(self._schedule.stage_of_step[step + 1:], minlength=len(self._schedule.stages))
        return float(sum(n * _seconds_per_step(median, stage) for n, stage in zip(counts, self._schedule.stages, strict=True) if n))


def _seconds_per_step(median: dict[Stage, float], stage: Stage) -> float:
    """See `Meter.seconds_per_step`; `median` are the seconds of the stages seen."""
    if not median:
        raise ValueError("no step has been recorded yet")
    if stage in median:
        return median[stage]
    nearest, *others = sorted(median, key=lambda s: abs(s.voxels - stage.voxels))
    proportional = median[nearest] * stage.voxels / nearest.voxels
    if not others or others[0].voxels == nearest.voxels:
        return proportional
    slope = (median[others[0]] - median[nearest]) / (others[0].voxels - nearest.voxels)
    line = median[nearest] + slope * (stage.voxels - nearest.voxels)
    return proportional if slope <= 0 else max(line, min(proportional, median[nearest]))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON knows no NaN
