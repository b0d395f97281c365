"""When training goes wrong: too little memory, losses that are not finite, pseudo-Dice that stays at or falls back to nothing."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pgps_jax.curriculum import Stage
from pgps_jax.data.pipeline import PatchBatch
from pgps_jax.errors import InputError, brief
from pgps_jax.json_file import read_json
from pgps_jax.train.memory import is_out_of_memory

MOST_SKIPPED = 3  # batches that a run may skip; more means that it is not the data
BACKGROUND_EPOCHS = 10  # without a single foreground voxel right, before that is worth a word


class StageTooLarge(Exception):
    """The device ran out of memory in a stage."""

    def __init__(self, stage: Stage):
        super().__init__(str(stage))
        self.stage = stage


@contextmanager
def memory_errors_of(stage: Stage) -> Iterator[None]:
    """Turn whatever says that the device is out of memory into StageTooLarge; nested, the innermost one names the stage."""
    try:
        yield
    except StageTooLarge:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise StageTooLarge(stage) from error
        raise


class NotFinite(Exception):
    """Loss or gradient of a step is not finite."""

    def __init__(self, step: int):
        super().__init__(f"step {step}")
        self.step = step


class SkippedSteps:
    """Steps of a run that make no update because their batch gave no finite loss; kept in RUN/skipped.json.

    They are data like the schedule: a resumed run skips the same ones.
    """

    def __init__(self, run_folder: Path):
        self._path = run_folder / "skipped.json"
        steps = read_json(self._path, list) if self._path.exists() else []
        if not all(type(step) is int for step in steps):
            raise InputError(f"{self._path}: want a list of steps, found {brief(steps)}; delete it to skip none")
        self.steps: set[int] = set(steps)

    def __contains__(self, step: int) -> bool:
        return step in self.steps

    def add(self, step: int) -> None:
        """Skip a step from now on. Raises InputError when too many have been skipped already."""
        if len(self.steps) >= MOST_SKIPPED or step in self.steps:
            raise InputError(
                f"loss or gradient of step {step} is not finite, and {len(self.steps)} batches have been skipped for that before; "
                f"look at the batches in {self._path.parent / 'not_finite'} and at the data (doctor), or lower --optim.learning-rate")
        self.steps.add(step)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(sorted(self.steps)))
        os.replace(temporary, self._path)


def keep_batch(run_folder: Path, step: int, batch: PatchBatch, case_ids: tuple[str, ...]) -> Path:
    """Write the batch of a step as the host cut it, with the ids of its cases, for looking at; returns the file."""
    folder = run_folder / "not_finite"
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{step}.npz"
    np.savez_compressed(path, image=batch.image, label=batch.label, cases=np.array(case_ids))
    return path


def concern(epochs: list[dict]) -> str | None:
    """A sentence when the newest epoch shows for the first time that training goes wrong; None otherwise.

    `epochs` are the epoch records of metrics.jsonl, oldest first.
    """
    if _only_background(epochs) and not _only_background(epochs[:-1]):
        return (f"warning: not one foreground voxel of the validation patches was right for {BACKGROUND_EPOCHS} epochs; the network "
                "predicts background only. A lower --optim.learning-rate, --optim.warmup-steps or more foreground "
                "(--sampling.foreground-fraction) may help")
    if _collapsed(epochs) and not _collapsed(epochs[:-1]):
        return "warning: the pseudo-Dice has fallen below half of its best moving average; the run may have diverged"
    return None


def _only_background(epochs: list[dict]) -> bool:
    last = epochs[-BACKGROUND_EPOCHS:]
    return len(last) == BACKGROUND_EPOCHS and all(not r["pseudo_dice_mean"] for r in last)


def _collapsed(epochs: list[dict]) -> bool:
    if not epochs or epochs[-1]["pseudo_dice_mean"] is None:
        return False
    best = max((r["pseudo_dice_ema"] for r in epochs if r["pseudo_dice_ema"] is not None), default=0.0)
    return best > 0.2 and epochs[-1]["pseudo_dice_mean"] < 0.5 * best
