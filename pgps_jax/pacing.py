"""Schedules that fit a time: how many steps a run may have, from the seconds that a step of each stage takes.

Step times are measured, so what depends on them is kept apart from the curriculum, which depends on the plan only. The
schedule that a run chose is stored with it and read again on resume.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from pgps_jax.curriculum import Schedule, Stage


def seconds_of(schedule: Schedule, seconds_per_step: Mapping[Stage, float] | Callable[[Stage], float]) -> float:
    """Seconds that all steps of a schedule take."""
    per_stage = seconds_per_step if callable(seconds_per_step) else seconds_per_step.__getitem__
    steps = np.bincount(schedule.stage_of_step, minlength=len(schedule.stages)).tolist()
    return float(sum(n * per_stage(stage) for stage, n in zip(schedule.stages, steps, strict=True) if n))


def fit_to_seconds(
    make: Callable[[int], Schedule],
    seconds_per_step: Callable[[Stage], float],
    budget_seconds: float,
    steps_per_epoch: int,
    max_steps: int,
) -> int:
    """Largest number of steps, in whole epochs where one fits, whose schedule takes at most `budget_seconds`.

    Never more than `max_steps`, never less than 1. `make` is `make_schedule` with everything but the number of steps
    filled in; the whole curriculum shrinks with the budget and still ends at the planned patch. `seconds_per_step` is
    asked about stages with every patch size of the curriculum, since a shorter schedule may use fewer of them.
    """

    def fits(num_steps: int) -> bool:
        return seconds_of(make(num_steps), seconds_per_step) <= budget_seconds

    unit = steps_per_epoch if max_steps >= steps_per_epoch and fits(steps_per_epoch) else 1
    low, high = 1, max_steps // unit
    if fits(high * unit):
        return max_steps if unit == 1 or fits(max_steps) else high * unit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * unit) else (low, middle)
    # Rounding to whole epochs makes the seconds rise a little unevenly with the number of steps: step down if need be.
    while low > 1 and not fits(low * unit):
        low -= 1
    return low * unit


def rescale_rest(
    schedule: Schedule, step: int, seconds_per_step: Callable[[Stage], float], seconds_left: float, most_steps: int
) -> Schedule:
    """The same schedule up to `step`, and the rest of it stretched or shortened to take `seconds_left`.

    For corrections on the way, when steps turned out slower or faster than first measured. Each remaining stage keeps its
    share of the remaining steps; the last step stays in the last stage. At least one step remains, and there are never
    more than `most_steps` in all, however much time is left.
    """
    rest = replace(
        schedule, stage_of_step=schedule.stage_of_step[step:], case_pool_of_step=schedule.case_pool_of_step[step:]
    )
    wanted = rest.num_steps * seconds_left / seconds_of(rest, seconds_per_step)
    wanted = max(1, int(min(wanted, most_steps - step)))
    chosen = step + ((np.arange(wanted) + 1) * rest.num_steps - 1) // wanted  # ends with the last one
    return replace(
        schedule,
        stage_of_step=np.concatenate([schedule.stage_of_step[:step], schedule.stage_of_step[chosen]]),
        case_pool_of_step=np.concatenate([schedule.case_pool_of_step[:step], schedule.case_pool_of_step[chosen]]),
    )
