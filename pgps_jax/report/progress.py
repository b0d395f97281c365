"""progress.png: how a run went, on one page, and the bar or the lines that are seen while it goes."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pgps_jax.report.run_log import complain, console

SECONDS_BETWEEN_LINES = 60.0  # where the output is no terminal


def _bar() -> Progress:
    """Bar with a free text field `note`; silent where the output is no terminal, so that logs stay readable."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console, transient=True,
        disable=not console.is_terminal,
    )


class CaseProgress:
    """How far a long work is, as the callback `progress(done, total)` that data-side functions take.

    A bar on a terminal; elsewhere, as in the log of a batch job, a plain line at most once a minute on the error stream.
    """

    def __init__(self, what: str):
        self._what, self._bar = what, _bar()
        self._task = self._bar.add_task(what, total=None, note="")
        self._first: tuple[int, float] | None = None  # how much was done at the first call, and when that was
        self._told = time.monotonic()

    def __enter__(self) -> "CaseProgress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int, note: str = "", seconds_left: Callable[[], float] | None = None) -> None:
        """Tell that `done` of `total` is done; `seconds_left` knows better than the pace so far what the rest will take."""
        self._bar.update(self._task, completed=done, total=total, note=note)
        now = time.monotonic()
        self._first = self._first or (done, now)
        if self._bar.disable and now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            left = seconds_left() if seconds_left else self._at_this_pace(done, total, now)
            complain(f"{self._what}: {done} of {total}, {duration(left)} left" + (f"  ({note})" if note else ""))

    def _at_this_pace(self, done: int, total: int, now: float) -> float:
        """Seconds that the rest takes when it goes on as until now; NaN as long as nothing can be told."""
        before, began = self._first
        return (now - began) / (done - before) * (total - done) if done > before else math.nan


def duration(seconds: float) -> str:
    """Seconds in words for people: 45 s, 12 min, 3.5 h, 12 days."""
    if math.isnan(seconds):
        return "an unknown time"
    for limit, size, unit in ((90, 1, "s"), (5400, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 10 or unit == "s" else f"{value:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def plot_progress(records: list[dict], path: Path, patch_volume_of_step: np.ndarray, batch_size_of_step: np.ndarray) -> None:
    """Write the picture: loss, pseudo-Dice, patch volume and batch size over steps, seconds per epoch.

    `records` are those of metrics.jsonl; the two arrays hold voxels per patch and patches per batch for every step.
    """
    steps = [r for r in records if r["kind"] == "step"]
    epochs = [r for r in records if r["kind"] == "epoch"]
    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    loss, dice, patch, seconds = figure.subplots(2, 2).ravel()

    if steps:
        x, y = np.array([r["step"] for r in steps]), np.array([r["loss"] for r in steps], float)
        loss.plot(x, y, color="0.8", linewidth=0.6, label="step")
    if epochs:
        end = [r["step"] + 1 for r in epochs]
        loss.plot(end, [r["train_loss"] for r in epochs], label="train, epoch mean")
        loss.plot(end, [r["validation_loss"] for r in epochs], label="validation")
        dice.plot(end, [_number(r["pseudo_dice_mean"]) for r in epochs], color="0.7", label="mean over classes")
        dice.plot(end, [_number(r["pseudo_dice_ema"]) for r in epochs], label="moving average")
        seconds.plot(end, [r["seconds"] for r in epochs], label="whole epoch")
        seconds.plot(end, [r["input_wait_seconds"] for r in epochs], label="waiting for input")
    for axis, title in ((loss, "loss (Dice + cross-entropy)"), (dice, "pseudo-Dice on validation patches"),
                        (seconds, "seconds per epoch")):
        axis.set(title=title, xlabel="step")
        if axis.has_data():
            axis.legend(loc="best", fontsize=8)
    dice.set_ylim(0, 1)

    x = np.arange(len(patch_volume_of_step))
    patch.step(x, patch_volume_of_step, where="post", color="tab:blue")
    patch.set(title="curriculum", xlabel="step")
    patch.set_ylabel("voxels per patch", color="tab:blue")
    batch = patch.twinx()
    batch.step(x, batch_size_of_step, where="post", color="tab:orange")
    batch.set_ylabel("patches per batch", color="tab:orange")
    batch.yaxis.set_major_locator(MaxNLocator(integer=True))
    batch.set_ylim(0, max(int(batch_size_of_step.max()) * 1.1, 2))
    if steps:
        patch.axvline(steps[-1]["step"] + 1, color="0.5", linestyle=":", linewidth=1)

    temporary = path.with_name(path.name + ".tmp.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
