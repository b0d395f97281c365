"""The curriculum: which patch size, batch size and cases each training step uses, decided before training starts.

A curriculum is a pure function

    (config, planned patch and batch, what patches the network can take, number of steps) -> Schedule

and a Schedule is plain arrays indexed by the step. Nothing else in the program knows how a schedule came about, so a
resumed run finds its place by looking up its step, and a new curriculum is a new way of filling these arrays:

    1. patch ladder   the patch sizes from the smallest to the planned one    `smallest_edge_first`, `round_robin`
    2. batch sizes    one per patch size                                      `batch_sizes`
    3. pacing         how many steps each of them gets                        `steps_per_stage`
    4. order          growing, reversed, shuffled, or drawn anew each step    `make_schedule`
    5. case pool      how many of the ranked cases each step may draw from    `case_pool`

Sources: "PGPS 2024" is Fischer et al., MICCAI 2024 (modes pgps, pgps-plus, rpss); "PGPS 2025" is Fischer et al.,
arXiv 2510.23241 (modes efficiency, performance); "PDL" is Choi et al., Progressive Deep Learning, 2020 and 2023.
Where the published code leaves its plan (patches larger than planned, a division by zero when there are fewer epochs
than patch sizes), this one stays within it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Int

from pgps_jax.architecture import PatchLimits, Size
from pgps_jax.errors import InputError

MOST_STEPS = 10**8  # of a stored schedule; four hundred times nnU-Net's length, and a bound for what a file can make us allocate

LARGEST_SIZE = 2**20  # of a stored patch's edge or batch

Mode = Literal["constant", "efficiency", "performance", "pgps", "pgps-plus", "rpss", "reversed", "random-order"]
Pacing = Literal["uniform", "volume", "equal-time"]
BatchPolicy = Literal["planned", "voxel-budget", "chain", "device-memory"]


@dataclass(frozen=True)
class Stage:
    """One patch size with its batch size; the key of one compiled training program."""

    index: int
    patch_size: Size
    batch_size: int
    parts: int = 1  # in which a batch is computed, one after the other; divides the batch size

    @property
    def voxels(self) -> int:
        """Voxels that one training step of this stage processes."""
        return self.batch_size * math.prod(self.patch_size)

    def __str__(self) -> str:
        parts = f" in {self.parts} parts" if self.parts > 1 else ""
        return f"{'x'.join(map(str, self.patch_size))} batch {self.batch_size}{parts}"


@dataclass(frozen=True, eq=False)
class Schedule:
    """What each training step uses: `stages[stage_of_step[step]]` and the first `case_pool_of_step[step]` ranked cases.

    Both arrays are int32 of length `num_steps`. Without a case curriculum the pool is all cases at every step.
    """

    stages: tuple[Stage, ...]
    stage_of_step: np.ndarray
    case_pool_of_step: np.ndarray

    @property
    def num_steps(self) -> int:
        """Number of optimizer updates."""
        return len(self.stage_of_step)

    def stage_at(self, step: int) -> Stage:
        """The stage of a step; `num_steps` steps exist, counted from 0."""
        return self.stages[int(self.stage_of_step[step])]

    def runs(self) -> list[tuple[Stage, int, int]]:
        """Maximal stretches of steps in one stage, in order: (stage, first step, number of steps)."""
        starts = np.flatnonzero(np.diff(self.stage_of_step, prepend=-1))
        lengths = np.diff(starts, append=self.num_steps)
        return [(self.stage_at(a), a, n) for a, n in zip(starts.tolist(), lengths.tolist(), strict=True)]


@dataclass(frozen=True)
class CurriculumConfig:
    """Which patches, batches and cases are used when."""

    mode: Mode = "efficiency"
    """constant: the planned patch throughout. efficiency, performance: patches grow in the smallest possible steps,
    with the planned batch size or with as many patches as fit the planned number of voxels (PGPS 2025). pgps,
    pgps-plus, rpss: growing patches, the same with larger early batches, and random patch sizes (PGPS 2024). reversed,
    random-order: the patches of efficiency from large to small or shuffled, as controls."""
    pacing: Pacing = "uniform"
    """Steps per patch size. uniform: equally many (papers). volume: in proportion to the patch's volume. equal-time: so
    that each patch size takes the same time, by seconds per step measured before the first one."""
    batch_policy: BatchPolicy | None = None
    """Batch size per patch size; what the mode says when not given. planned: always the planned one. voxel-budget: as
    many as fit the planned number of voxels per step. chain: the rule of pgps-plus. device-memory: as many as fit the
    device, found by compiling."""
    memory_fraction: float = 0.9
    """Share of the device's memory that batch_policy device-memory, or a batch with --accumulate auto, may fill."""
    dataset_share: float | None = None
    """Largest share of the dataset's voxels that a batch of batch_policy device-memory may hold, 2 patches always; nnU-Net plans
    with 0.05. No such limit when not given."""
    schedule_seed: int = 0
    """Seed of the random choices of rpss and random-order."""
    case_curriculum: Literal["none", "pdl", "pdl-two-stage"] = "none"
    """Which cases are in use. none: all. pdl: begin with the cases most similar to the others, add the next ones every
    case_epochs epochs (PDL 2020). pdl-two-stage: all others join at once after case_epochs epochs (PDL 2023). Goes with
    every mode; epochs must suffice for all cases."""
    case_epochs: int = 10
    """Epochs before cases are added: 10 for CT and 20 for MRI in PDL 2020. Fewer in a run that max_hours shortens, by as
    much as the run is shorter than its epochs."""
    case_share: float = 0.25
    """Share of the cases to begin with, and to add each time with pdl; our choice, the papers do not tell theirs."""

    def check(self) -> None:
        """Raise InputError if a value is out of its range."""
        for flag, value, least in (("case-epochs", self.case_epochs, 1), ("schedule-seed", self.schedule_seed, 0)):
            if value < least:
                raise InputError(f"--{flag} {value}: must be at least {least}")
        shares = {"case-share": self.case_share, "memory-fraction": self.memory_fraction, "dataset-share": self.dataset_share}
        for flag, value in shares.items():
            if value is not None and not 0 < value <= 1:
                raise InputError(f"--{flag} {value}: must be above 0 and at most 1")


def make_schedule(
    config: CurriculumConfig,
    patch_size: Size,
    batch_size: int,
    limits: PatchLimits,
    num_steps: int,
    steps_per_epoch: int,
    *,
    num_cases: int = 1,
    whole_steps: int | None = None,
    stages: Sequence[Stage] | None = None,
    seconds_per_step: Sequence[float] | None = None,
) -> Schedule:
    """The whole schedule of a run.

    Args:
        patch_size, batch_size: as planned, in voxels (d, h, w) and patches.
        limits: smallest patch and increment per axis that the network can take.
        num_steps, steps_per_epoch: stages change at multiples of `steps_per_epoch` if there is a whole epoch at all.
            With fewer epochs than patch sizes, evenly spaced patch sizes are left out; the planned one stays last.
        num_cases: number of training cases, for the case curriculum.
        whole_steps: the length that `case_epochs` is meant for, where `num_steps` is less to fit a time; cases are then
            added sooner in proportion. `num_steps` when not given.
        stages: what `all_stages` gives, with batch sizes and parts changed where a machine had a say in them.
        seconds_per_step: measured seconds, one per stage of `stages`, for pacing equal-time; by voxels when not given.

    Raises InputError if the planned patch cannot be reached, naming the axis and the rule, and if there are too few
    steps for all cases to come into use.
    """
    _check(config, patch_size, batch_size, limits, num_steps, steps_per_epoch, num_cases)
    stages = all_stages(config, patch_size, batch_size, limits) if stages is None else tuple(stages)
    weights = _pacing_weights(config.pacing, stages, seconds_per_step)
    pool = case_pool(config, num_cases, num_steps, steps_per_epoch, whole_steps)
    rng = np.random.default_rng(config.schedule_seed)

    if config.mode == "rpss":
        share = np.ones(len(stages)) if weights is None else weights
        drawn = rng.choice(len(stages), size=num_steps, p=share / share.sum())
        return Schedule(stages, drawn.astype(np.int32), pool)

    kept = _evenly(len(stages), max(1, min(len(stages), num_steps // _unit(num_steps, steps_per_epoch))))
    steps = steps_per_stage(None if weights is None else weights[kept], len(kept), num_steps, steps_per_epoch)
    order = np.arange(len(kept))  # the controls reorder, but each patch size keeps its number of steps
    if config.mode == "reversed":
        order = order[::-1]
    elif config.mode == "random-order":
        order = rng.permutation(order)
    in_order = tuple(replace(stages[kept[j]], index=i) for i, j in enumerate(order))
    return Schedule(in_order, np.repeat(np.arange(len(order), dtype=np.int32), steps[order]), pool)


def all_stages(config: CurriculumConfig, patch_size: Size, batch_size: int, limits: PatchLimits) -> tuple[Stage, ...]:
    """Every patch size of a curriculum, smallest first, with its batch size; a short schedule uses only some of them."""
    ladder = patch_ladder(config.mode, patch_size, limits)
    batches = batch_sizes(batch_policy(config), ladder, batch_size)
    return tuple(Stage(i, patch, batch) for i, (patch, batch) in enumerate(zip(ladder, batches, strict=True)))


# 1. Patch ladders


def patch_ladder(mode: Mode, patch_size: Size, limits: PatchLimits) -> tuple[Size, ...]:
    """The patch sizes that a mode uses, smallest first, planned last."""
    if mode == "constant":
        return (patch_size,)
    if mode in ("pgps", "pgps-plus", "rpss"):
        return round_robin(patch_size, limits)
    return smallest_edge_first(patch_size, limits)


def smallest_edge_first(patch_size: Size, limits: PatchLimits) -> tuple[Size, ...]:
    """Grow, one increment at a time, the axis whose next edge is shortest (PGPS 2025); ties go to the first."""
    ladder = [limits.smallest]
    while growing := _axes_with_room(ladder[-1], patch_size):
        axis = min(growing, key=lambda k: ladder[-1][k] + limits.increment[k])
        ladder.append(_grown(ladder[-1], axis, limits))
    return tuple(ladder)


def round_robin(patch_size: Size, limits: PatchLimits) -> tuple[Size, ...]:
    """Grow the axes in turn, one increment at a time (PGPS 2024).

    One axis starts an increment larger, because PyTorch's instance norm refuses a bottleneck of a single voxel: the
    first one in the paper, the first one with room here. The turns begin with the axis after it.
    """
    room = _axes_with_room(limits.smallest, patch_size)
    if not room:
        return (patch_size,)
    ladder, turn = [_grown(limits.smallest, room[0], limits)], room[0] + 1
    while growing := _axes_with_room(ladder[-1], patch_size):
        if turn % 3 in growing:
            ladder.append(_grown(ladder[-1], turn % 3, limits))
        turn += 1
    return tuple(ladder)


def _axes_with_room(patch: Size, planned: Size) -> list[int]:
    return [k for k in range(3) if patch[k] < planned[k]]


def _grown(patch: Size, axis: int, limits: PatchLimits) -> Size:
    d, h, w = (edge + (limits.increment[k] if k == axis else 0) for k, edge in enumerate(patch))
    return d, h, w


# 2. Batch sizes


def batch_policy(config: CurriculumConfig) -> BatchPolicy:
    """The batch policy asked for, or else the one that belongs to the mode."""
    by_mode: dict[str, BatchPolicy] = {"performance": "voxel-budget", "pgps-plus": "chain"}
    return config.batch_policy or by_mode.get(config.mode, "planned")


def batch_sizes(policy: BatchPolicy, ladder: Sequence[Size], batch_size: int) -> tuple[int, ...]:
    """Batch size of each patch size of a ladder that ends with the planned one, for which `batch_size` was planned.

    voxel-budget (PGPS 2025): floor(batch_size * planned volume / volume). chain (PGPS 2024, PGPS+): backwards from 2
    patches of the planned size, each floor(next batch * next volume / volume), and nowhere below `batch_size`.
    device-memory: as voxel-budget, until compiled programs tell what fits and `with_batch_sizes` replaces them; equal
    voxels need about equal memory, so that the search begins close by.
    """
    volumes = [math.prod(patch) for patch in ladder]
    if policy in ("voxel-budget", "device-memory"):
        return tuple(batch_size * volumes[-1] // volume for volume in volumes)
    if policy == "chain":
        chain = [min(2, batch_size)]
        for volume, larger in zip(volumes[-2::-1], volumes[:0:-1], strict=True):
            chain.append(larger * chain[-1] // volume)
        return tuple(max(batch, batch_size) for batch in reversed(chain))
    return (batch_size,) * len(ladder)


def with_batch_sizes(schedule: Schedule, batch_sizes: Sequence[int]) -> Schedule:
    """The same schedule with other batch sizes, one per stage."""
    stages = zip(schedule.stages, batch_sizes, strict=True)
    return replace(schedule, stages=tuple(replace(stage, batch_size=int(batch)) for stage, batch in stages))


def parts_at_least(batch_size: int, wanted: int, multiple_of: int = 1) -> int:
    """The fewest equal parts, `wanted` or more, of a batch; each is a multiple of `multiple_of`. As many as possible if none is enough."""
    most = batch_size // multiple_of
    return next((n for n in range(min(wanted, most), most + 1) if most % n == 0), 1)


# 3. Pacing


def steps_per_stage(
    weights: np.ndarray | None, num_stages: int, num_steps: int, steps_per_epoch: int
) -> Int[np.ndarray, " stages"]:
    """Steps of each stage, adding up to `num_steps`; whole epochs, but for the last stage which takes what is left.

    Without weights: floor(epochs / stages) epochs each, the remainder to the last (both papers). With weights: one
    epoch each, the others in proportion to the weights, rounded by largest remainder. If there is no whole epoch, steps
    take the place of epochs.
    """
    unit = _unit(num_steps, steps_per_epoch)
    units = num_steps // unit
    if weights is None:
        counts = np.full(num_stages, units // num_stages)
        counts[-1] += units - counts.sum()
    else:
        quota = weights / weights.sum() * (units - num_stages)
        counts = 1 + np.floor(quota).astype(int)
        largest_remainders = np.argsort(np.floor(quota) - quota, kind="stable")
        counts[largest_remainders[: units - counts.sum()]] += 1
    counts = counts * unit
    counts[-1] += num_steps - counts.sum()
    return counts


def _unit(num_steps: int, steps_per_epoch: int) -> int:
    """Stage borders are multiples of this: whole epochs where there are any."""
    return steps_per_epoch if num_steps >= steps_per_epoch else 1


def _pacing_weights(pacing: Pacing, stages: Sequence[Stage], seconds: Sequence[float] | None) -> np.ndarray | None:
    if pacing == "uniform":
        return None
    if pacing == "volume":
        return np.array([math.prod(stage.patch_size) for stage in stages], float)
    seconds = [stage.voxels for stage in stages] if seconds is None else seconds
    if len(seconds) != len(stages) or min(seconds) <= 0:
        raise ValueError(f"pacing equal-time: need {len(stages)} positive seconds per step, found {list(seconds)}")
    return 1 / np.array(seconds, float)


def _evenly(available: int, wanted: int) -> np.ndarray:
    """`wanted` of the indices 0 .. available - 1 at even distances, always with the last one."""
    return available - 1 - np.round(np.linspace(0, available - 1, wanted)).astype(int)[::-1]


# 5. Cases


def case_pool(
    config: CurriculumConfig, num_cases: int, num_steps: int, steps_per_epoch: int, whole_steps: int | None = None
) -> Int[np.ndarray, " steps"]:
    """Number of ranked cases in use at each step; see `CurriculumConfig.case_curriculum`, and `make_schedule` for `whole_steps`.

    Raises InputError, naming the epochs that would do, if the last step does not use all cases.
    """
    if config.case_curriculum == "none":
        return np.full(num_steps, num_cases, np.int32)
    whole_steps = whole_steps or num_steps
    first = max(1, math.ceil(config.case_share * num_cases))
    growth = first if config.case_curriculum == "pdl" else num_cases
    epochs_before_last = -(-(num_cases - first) // growth) * config.case_epochs
    if whole_steps <= epochs_before_last * steps_per_epoch:
        raise InputError(
            f"--case-curriculum {config.case_curriculum}: the last of {num_cases} cases are added after {epochs_before_last} epochs, and "
            f"{whole_steps / steps_per_epoch:g} are asked for; use --epochs {epochs_before_last + 1} or more, fewer --case-epochs or a "
            "larger --case-share"
        )
    step_of_whole = ((np.arange(num_steps) + 1) * whole_steps - 1) // num_steps  # ends with the last one
    additions = step_of_whole // (config.case_epochs * steps_per_epoch)
    return np.minimum(first + additions * growth, num_cases).astype(np.int32)


# Checks and JSON


def _check(
    config: CurriculumConfig, patch_size: Size, batch_size: int, limits: PatchLimits,
    num_steps: int, steps_per_epoch: int, num_cases: int,
) -> None:
    config.check()
    for name, value in (("batch size", batch_size), ("number of steps", num_steps), ("number of cases", num_cases),
                        ("steps per epoch", steps_per_epoch)):
        if value < 1:
            raise InputError(f"curriculum: the {name} must be at least 1, found {value}")
    if num_steps > MOST_STEPS:
        raise InputError(f"curriculum: {num_steps} steps; at most {MOST_STEPS} are planned. Use fewer epochs")
    for axis, planned, smallest, increment in zip("dhw", patch_size, *limits, strict=True):
        if planned < smallest or (planned - smallest) % increment:
            raise InputError(
                f"planned patch {'x'.join(map(str, patch_size))}: edge {planned} along axis {axis} cannot be reached; "
                f"the network takes {smallest} voxels and multiples of {increment} more. Change the patch in the plan"
            )


def schedule_to_json(schedule: Schedule) -> dict:
    """JSON form of a schedule, read back exactly by `schedule_from_json`.

    The arrays are run-length encoded in a string: "0x250 1x500 2" is 250 times 0, 500 times 1 and a single 2.
    """
    return {
        "stages": [{"patch_size": list(s.patch_size), "batch_size": s.batch_size, "parts": s.parts} for s in schedule.stages],
        "stage_of_step": _encode(schedule.stage_of_step),
        "case_pool_of_step": _encode(schedule.case_pool_of_step),
    }


def schedule_from_json(values: dict) -> Schedule:
    """Inverse of `schedule_to_json`. Raises InputError if the values are no schedule."""
    try:
        stages = []
        for i, stage in enumerate(values["stages"]):
            d, h, w = (int(edge) for edge in stage["patch_size"])
            stages.append(Stage(i, (d, h, w), int(stage["batch_size"]), int(stage.get("parts", 1))))
            if not 1 <= min(d, h, w, stages[-1].batch_size) <= max(d, h, w, stages[-1].batch_size) <= LARGEST_SIZE:
                raise ValueError(f"stage {i} has a size below 1 or above {LARGEST_SIZE}")
            if stages[-1].parts < 1 or stages[-1].batch_size % stages[-1].parts:
                raise ValueError(f"stage {i}: a batch of {stages[-1].batch_size} cannot be computed in {stages[-1].parts} parts")
        stage_of_step, pool = _decode(values["stage_of_step"]), _decode(values["case_pool_of_step"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"schedule.json: not a schedule ({error!r}); start with --fresh") from error
    if not 0 < len(stage_of_step) == len(pool):
        raise InputError(f"schedule.json: {len(stage_of_step)} steps but case pools of {len(pool)}; start with --fresh")
    if not 0 <= stage_of_step.min() <= stage_of_step.max() < len(stages):
        raise InputError(f"schedule.json: its steps name stages beyond the {len(stages)} given; start with --fresh")
    if pool.min() < 1:
        raise InputError(f"schedule.json: a pool of {pool.min()} cases; there is one case at least. Start with --fresh")
    return Schedule(tuple(stages), stage_of_step, pool)


def _encode(values: np.ndarray) -> str:
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    lengths = np.diff(starts, append=len(values))
    return " ".join(str(v) if n == 1 else f"{v}x{n}" for v, n in zip(values[starts], lengths, strict=True))


def _decode(text: str) -> Int[np.ndarray, " steps"]:
    runs = [word.partition("x") for word in text.split()]
    lengths = [int(n or 1) for _, _, n in runs]
    if min(lengths, default=1) < 1 or sum(lengths) > MOST_STEPS:
        raise ValueError(f"{sum(lengths)} steps; 1 to {MOST_STEPS} are believed")
    return np.repeat(np.array([int(v) for v, _, _ in runs], np.int32), lengths)
