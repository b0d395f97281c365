"""progress.png: how a run went, on one page, and the bar that is seen while it goes."""

import os
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pgps_jax.report.run_log import console


def progress_bar() -> Progress:
    """Bar with a free text field `note`; silent where the output is no terminal, so that logs stay readable."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console, transient=True,
        disable=not console.is_terminal,
    )


class CaseProgress:
    """A bar over cases as the callback `progress(done, total)` that data-side functions take."""

    def __init__(self, what: str):
        self._bar = progress_bar()
        self._task = self._bar.add_task(what, total=None, note="")

    def __enter__(self) -> "CaseProgress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)


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
