"""A schedule before it is run: the stage table for people and programs, and a picture of it over the steps."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from pgps_jax.architecture import Size
from pgps_jax.curriculum import Schedule, Stage
from pgps_jax.data.class_balance import StageBalance

POINTS = 2000  # drawn per curve at most: more cannot be told apart, and random patch sizes would draw every step
MOST_CLASSES = 7  # drawn beside the foreground as a whole; more lines cannot be told apart


def stage_rows(
    schedule: Schedule, patch_size: Size, batch_size: int, memory: Mapping[Stage, int] | None = None
) -> list[dict[str, Any]]:
    """One JSON-able row per stage in use.

    `patch_size` and `batch_size` are the planned ones, with which constant-patch training takes every step; `share` is
    the voxels of a stage's step over theirs. `cases` are the fewest and the most cases that its steps draw from.
    `memory_bytes` is what the stage will need on each device (`train.forecast`), None where `memory` does not tell.
    """
    steps = np.bincount(schedule.stage_of_step, minlength=len(schedule.stages))
    pools = [schedule.case_pool_of_step[schedule.stage_of_step == stage.index] for stage in schedule.stages]
    return [
        {
            "stage": stage.index,
            "patch_size": list(stage.patch_size),
            "batch_size": stage.batch_size,
            "parts": stage.parts,
            "first_step": int(np.argmax(schedule.stage_of_step == stage.index)),
            "steps": int(n),
            "voxels_per_step": stage.voxels,
            "share": stage.voxels / (batch_size * math.prod(patch_size)),
            "cases": [int(pool.min()), int(pool.max())],
            "memory_bytes": (memory or {}).get(stage),
        }
        for stage, n, pool in zip(schedule.stages, steps, pools, strict=True) if n
    ]


def voxel_share(rows: list[dict[str, Any]]) -> float:
    """Voxels of all steps over those of constant-patch training with as many steps."""
    return sum(row["steps"] * row["share"] for row in rows) / sum(row["steps"] for row in rows)


def schedule_table(rows: list[dict[str, Any]], title: str = "") -> Table:
    """The stage table for the terminal; without memory where nothing is known of it, without cases where all are in use throughout."""
    caption = f"{voxel_share(rows):.3f} of the voxels of constant-patch training with as many steps"
    table = Table(title=title or None, caption=caption)
    with_memory = any(row["memory_bytes"] is not None for row in rows)
    with_cases = len({number for row in rows for number in row["cases"]}) > 1
    headings = ["stage", "patch (d x h x w)", "batch", "first step", "steps", "voxels/step", "share"]
    for heading in [*headings, *["cases"] * with_cases, *["memory (forecast)"] * with_memory]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        parts = f" ({row['parts']} parts)" if row["parts"] > 1 else ""
        cells = [str(row["stage"]), " x ".join(map(str, row["patch_size"])), f"{row['batch_size']:,}{parts}",
                 f"{row['first_step']:,}", f"{row['steps']:,}", f"{row['voxels_per_step']:,}", f"{row['share']:.3f}"]
        if with_cases:
            cells.append(" to ".join(map(str, dict.fromkeys(row["cases"]))))
        if with_memory:
            size = row["memory_bytes"]
            cells.append("" if size is None else f"{size / 2**20:,.0f} MiB")
        table.add_row(*cells)
    return table


def plot_schedule(schedule: Schedule, path: Path, balance: Sequence[StageBalance] = ()) -> None:
    """Write the picture: patch edges, batch size and voxels over steps; a PNG, replaced in one go.

    With the `balance` of every stage in use (`data.class_balance`) also the predicted share of foreground in its patches.
    """
    panels = 4 if balance else 3
    figure = Figure(figsize=(9, 2.1 * panels), layout="constrained")
    FigureCanvasAgg(figure)
    patch, batch, voxels, *last = figure.subplots(panels, 1, sharex=True)

    switches = len(schedule.runs())
    if switches <= POINTS / 2:  # both ends of each stage
        step = np.array([x for _, first, n in schedule.runs() for x in (first, first + n)])
        stage = schedule.stage_of_step[np.array([x for _, first, n in schedule.runs() for x in (first, first + n - 1)])]
        style = {"linewidth": 1.5}
    else:
        step = np.unique(np.linspace(0, schedule.num_steps - 1, POINTS).astype(int))
        stage = schedule.stage_of_step[step]
        style = {"linestyle": "", "marker": ".", "markersize": 2}

    edges = np.array([s.patch_size for s in schedule.stages])
    for k, axis in enumerate("dhw"):
        patch.plot(step, edges[stage, k], label=axis, alpha=0.8, **style)
    patch.set(ylabel="patch edge (voxels)", ylim=(0, None))
    patch.legend(ncols=3, fontsize=8)
    batch.plot(step, np.array([s.batch_size for s in schedule.stages])[stage], color="tab:orange", **style)
    batch.set(ylabel="patches per step", yscale="log")
    per_step = np.array([s.voxels for s in schedule.stages])
    mean = per_step[schedule.stage_of_step].mean()
    voxels.plot(step, per_step[stage], color="tab:blue", **style)
    voxels.axhline(mean, color="0.5", linestyle=":", label=f"mean {mean:,.0f}")
    voxels.set(ylabel="voxels per step", ylim=(0, 1.1 * per_step.max()))
    voxels.legend(fontsize=8)
    for axes in last:
        _plot_balance(axes, {b.stage.index: b for b in balance}, step, stage, style)
    (last or [voxels])[0].set_xlabel("step")

    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)


def _plot_balance(axes: Any, of_stage: dict[int, StageBalance], step: np.ndarray, stage: np.ndarray, style: dict) -> None:
    """Share of foreground, and of each class where there are several, over the steps."""
    indices = stage.tolist()
    axes.plot(step, [of_stage[i].foreground for i in indices], color="0.2", label="foreground", **style)
    names = list(next(iter(of_stage.values())).classes)
    for name in names[:MOST_CLASSES] if len(names) > 1 else ():
        axes.plot(step, [of_stage[i].classes[name] for i in indices], alpha=0.8, label=name, **style)
    axes.set(ylabel="share of voxels\nin the patches", ylim=(0, None))
    axes.legend(ncols=4, fontsize=8)
