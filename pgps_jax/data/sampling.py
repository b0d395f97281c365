"""Which patches a batch is made of: case, forced foreground or not, box; and cutting them out.

Everything is a pure function of a random generator, in three steps, so that each can be looked at alone:

    draw_batch   rng -> which case and whether forced foreground, per crop, and a row of uniform numbers for each crop
    place_crops  a crop's row of numbers + shape and foreground voxels of its case -> where the crop starts
    cut_crops    starts -> voxels, 0 (image) and -1 (label) outside the case

All randomness of crop i is in row i of one table, so any crop of a batch can be made without making the others.

Sources: "PGPS 2025" is the published sampler of Fischer et al., arXiv 2510.23241 (several crops per loaded case, cases
alternate between random and forced foreground); "nnU-Net" is the data loader of nnU-Net 2.8.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from pgps_jax.architecture import Size
from pgps_jax.data.labels import Label
from pgps_jax.data.store import StoredCase
from pgps_jax.errors import InputError


@dataclass(frozen=True)
class SamplingConfig:
    """Which patches are cut from which cases."""

    scheme: Literal["paired", "per-case"] | None = None
    """paired: at most the planned batch size of cases are loaded, several crops are cut from each, and whole cases
    alternate between random and forced foreground, the first one random (PGPS 2025). per-case: one case per crop, the
    last ones of the batch forced (PGPS 2024, nnU-Net). When not given, as in the paper of the mode: per-case for pgps,
    pgps-plus and rpss, paired for all others and for the patches of validation."""
    foreground_fraction: float = 0.5
    """Share of crops (paired: of cases) that are centred on a foreground voxel. Both PGPS papers: 0.5; nnU-Net: 0.33."""
    jitter: float = 0.0
    """Shift forced crops at random by up to this share of the patch along each axis; the chosen voxel stays inside."""
    class_weights: tuple[float, ...] = ()
    """How often forced crops aim at each foreground class or region, in the order of dataset.json; equally if empty."""
    case_weights: tuple[tuple[str, float], ...] = ()
    """Cases to be drawn more or less often: pairs of case id and weight. A case that is not named has weight 1."""

    def check(self) -> None:
        """Raise InputError if a value is out of its range."""
        if not 0 <= self.foreground_fraction <= 1:
            raise InputError(f"sampling: foreground-fraction must be 0 to 1, found {self.foreground_fraction}")
        if not 0 <= self.jitter <= 0.5:
            raise InputError(f"sampling: jitter must be 0 to 0.5 of the patch, found {self.jitter}")
        for name, weights in (("class", self.class_weights), ("case", tuple(w for _, w in self.case_weights))):
            if not all(math.isfinite(w) and w >= 0 for w in weights) or (name == "class" and weights and max(weights) == 0):
                raise InputError(f"sampling: {name}-weights must be finite and not negative, and not all 0; found {weights}")


# 1. Cases


class BatchDraw(NamedTuple):
    """The random choices of a batch of b crops that do not depend on what is in the cases."""

    case: np.ndarray  # int64 (b,): index of the case
    forced: np.ndarray  # bool (b,): centred on foreground?
    numbers: np.ndarray  # float64 (b, 5), uniform in [0, 1): class, voxel, and one per axis


def crops_per_case(config: SamplingConfig, batch_size: int, planned_batch_size: int) -> int:
    """How many crops are cut from each case that is drawn; the last case may give fewer."""
    return 1 if config.scheme == "per-case" else math.ceil(batch_size / planned_batch_size)


def forced_crops(config: SamplingConfig, batch_size: int, planned_batch_size: int, step: int) -> Bool[np.ndarray, " b"]:
    """Which crops of a batch are forced foreground; the same for every batch of a stage, but for those of a single case.

    per-case: crop j is forced unless j < round(b * (1 - fraction)), halves to even (nnU-Net). paired: case g of the
    batch is forced if floor((g + 1) * fraction) > floor(g * fraction), which for 0.5 is every second one, the first one
    random (PGPS 2025). A batch of a single case cannot hold both kinds: there the step takes the place of g, so that
    every second batch is forced (the published sampler would never force any).
    """
    f, per_case = config.foreground_fraction, crops_per_case(config, batch_size, planned_batch_size)
    crop = np.arange(batch_size)
    case = crop // per_case
    if case[-1] == 0:
        case = np.full(batch_size, step)
    elif config.scheme == "per-case":
        return crop >= round(batch_size * (1 - f))
    return np.floor((case + 1) * f) > np.floor(case * f)


def draw_batch(
    rng: np.random.Generator,
    config: SamplingConfig,
    batch_size: int,
    planned_batch_size: int,
    weights: Float[np.ndarray, " cases"],
    step: int,
) -> BatchDraw:
    """Draw cases with replacement, and the numbers that will place the crops.

    Args:
        weights: how often each case is drawn, in any unit; at least one is above 0.
        planned_batch_size: of the plan, not of the stage.
        step: number of the batch, for batches of a single case.
    """
    per_case = crops_per_case(config, batch_size, planned_batch_size)
    ends = np.cumsum(weights)
    drawn = np.searchsorted(ends, rng.random(math.ceil(batch_size / per_case)) * ends[-1], side="right")
    drawn = np.minimum(drawn, len(weights) - 1)  # in case the product was rounded up to the end
    numbers = rng.random((batch_size, 5))
    forced = forced_crops(config, batch_size, planned_batch_size, step)
    return BatchDraw(np.repeat(drawn, per_case)[:batch_size], forced, numbers)


# 2. Boxes


class Placement(NamedTuple):
    """Where n crops of one case start, and the class or region that each aims at (None: nowhere in particular)."""

    start: np.ndarray  # int64 (n, 3), may be negative
    label: list[Label | None]


def start_bounds(shape: Size, crop_size: Size, patch_size: Size) -> tuple[Int[np.ndarray, "3"], Int[np.ndarray, "3"]]:
    """First and last start of a random crop per axis, both possible (nnU-Net's rule).

    A crop that is larger than the patch (for augmentation) may hang over the border by half the difference, so that the
    patches themselves cover the case evenly; where the case is smaller than the patch, the crop holds the whole case.
    """
    image, crop, patch = np.array(shape), np.array(crop_size), np.array(patch_size)
    need = np.maximum(crop - patch, crop - image)
    return -need // 2, image + need // 2 + need % 2 - crop


def place_crops(
    numbers: Float[np.ndarray, "n 5"],
    forced: Bool[np.ndarray, " n"],
    shape: Size,
    locations: dict[Label, np.ndarray],
    crop_size: Size,
    patch_size: Size,
    config: SamplingConfig,
) -> Placement:
    """Place crops in one case (nnU-Net's rules).

    Random: uniform between `start_bounds`. Forced: a class among those that the case has, one of its stored voxels, and
    the crop centred on it; clamped below but not above, so that crops may hang over the upper border. A case without
    foreground gives random crops. Where part of the voxels is to be ignored (`locations` has the key (-1, 0, 1, ...) for
    annotated voxels), crops that are not forced are centred on an annotated voxel.

    Args:
        locations: voxels (k, 3) of each class or region; k may be 0.
        crop_size, patch_size: what is cut and what the network will see of it.
    """
    first, last = start_bounds(shape, crop_size, patch_size)
    start = first + np.floor(numbers[:, 2:] * (last - first + 1)).astype(np.int64)
    classes, ends, annotated = _targets(locations, config)
    aim = np.full(len(numbers), -1)  # index into classes; the annotated voxels come last
    if annotated is not None and len(locations[annotated]):
        aim[:] = len(classes)
    if classes:
        chosen = np.searchsorted(ends, numbers[:, 0] * ends[-1], side="right")
        aim = np.where(forced, np.minimum(chosen, len(classes) - 1), aim)
    targets = [*classes, annotated]
    largest_shift = np.minimum(np.floor(config.jitter * np.array(patch_size)), (np.array(patch_size) - 1) // 2)
    shift = np.floor(numbers[:, 2:] * (2 * largest_shift + 1)) - largest_shift
    shift = (shift * forced[:, None]).astype(np.int64)
    for k in np.unique(aim[aim >= 0]):
        rows, voxels = np.flatnonzero(aim == k), locations[targets[k]]
        voxel = voxels[np.floor(numbers[rows, 1] * len(voxels)).astype(np.int64)].astype(np.int64)
        start[rows] = np.maximum(first, voxel - np.array(crop_size) // 2 + shift[rows])
    return Placement(start, [targets[k] if k >= 0 else None for k in aim])


def is_annotated(label: Label) -> bool:
    """Is this key of the locations nnU-Net's "annotated voxels" (-1 and all labels) rather than a region?"""
    return isinstance(label, tuple) and label[0] == -1


def _targets(
    locations: dict[Label, np.ndarray], config: SamplingConfig
) -> tuple[list[Label], np.ndarray, Label | None]:
    """Classes that forced crops can aim at, their cumulative weights, and the key of the annotated voxels if any."""
    annotated = next((label for label in locations if is_annotated(label)), None)
    labels = [label for label in locations if label != annotated]
    weights = config.class_weights or (1.0,) * len(labels)
    pairs = [(label, w) for label, w in zip(labels, weights, strict=True) if w > 0 and len(locations[label])]
    return [label for label, _ in pairs], np.cumsum([w for _, w in pairs]), annotated


# 3. Voxels


def cut_crops(
    case: StoredCase,
    start: Int[np.ndarray, "n 3"],
    image: np.ndarray,
    label: np.ndarray,
    rows: Int[np.ndarray, " n"],
) -> None:
    """Cut crops of one case and write them to rows of a batch; only the parts of the case that are needed are read.

    Args:
        image: (b, d, h, w, c) of any float type, all 0; receives the intensities.
        label: (b, d, h, w) of any signed integer type, all -1; receives the labels.
    """
    size, shape = np.array(label.shape[1:]), np.array(case.seg.shape[1:])
    low, high = np.clip(start, 0, shape), np.clip(start + size, 0, shape)
    shared = np.prod(high.max(axis=0) - low.min(axis=0)) <= np.prod(high - low, axis=1).sum()
    if len(start) > 1 and shared:
        _cut_from_one_box(case, start, image, label, rows)
        return
    for row, begin, a, b in zip(rows.tolist(), start, low, high, strict=True):
        source = (slice(None), *map(slice, a.tolist(), b.tolist()))
        target = (row, *map(slice, (a - begin).tolist(), (b - begin).tolist()))
        _write(np.moveaxis(case.image[source], 0, -1), image[target])
        label[target] = case.seg[source][0]


def _cut_from_one_box(case: StoredCase, start: np.ndarray, image: np.ndarray, label: np.ndarray, rows: np.ndarray) -> None:
    """The same for crops that overlap so much that the box around all of them is smaller than they are together."""
    size, shape = label.shape[1:], np.array(case.seg.shape[1:])
    origin, extent = start.min(axis=0), start.max(axis=0) - start.min(axis=0) + size
    low, high = np.clip(origin, 0, shape), np.clip(origin + extent, 0, shape)
    source = (slice(None), *map(slice, low.tolist(), high.tolist()))
    target = (slice(None), *map(slice, (low - origin).tolist(), (high - origin).tolist()))
    corners = list(zip(rows.tolist(), (start - origin).tolist(), strict=True))
    for stored, outside, crops in ((case.image, 0, image), (case.seg, -1, label[..., None])):
        box = np.full((len(stored), *extent), outside, crops.dtype)
        _write(stored[source], box[target])
        windows = np.moveaxis(np.lib.stride_tricks.sliding_window_view(box, size, axis=(1, 2, 3)), 0, -1)
        for row, (i, j, k) in corners:
            crops[row] = windows[i, j, k]


def _write(piece: np.ndarray, target: np.ndarray) -> None:
    """Copy, and convert; intensities that were never normalised must not become infinite in float16."""
    try:
        with np.errstate(over="raise"):
            target[...] = piece
    except FloatingPointError:
        largest = np.finfo(target.dtype).max
        target[...] = np.clip(piece, -largest, largest)
