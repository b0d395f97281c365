"""From logits on the preprocessed grid back to a label map in the frame of the image file.

Memory does not grow with the number of classes: they are interpolated one after the other against the best so far, each
only where it can win, and never held together at full resolution.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from pgps_jax.architecture import Size
from pgps_jax.data.labels import Labels
from pgps_jax.data.plan import Configuration, Plan
from pgps_jax.data.preprocess import target_spacing
from pgps_jax.data.resample import Spacing, coarse_axis

Box = tuple[slice, slice, slice]


class Grids(NamedTuple):
    """The way back: shape to reach, spacing of the preprocessed grid and of the original one; transposed axes."""

    shape: Size
    spacing: Spacing
    new_spacing: Spacing


class Taps(NamedTuple):
    """For each position of a new axis the two old positions that it lies between, and the share of the higher."""

    low: np.ndarray
    high: np.ndarray  # equals `low` where the share is 0
    share: np.ndarray  # float32


def restore_labels(
    logits: Float[np.ndarray, "k d h w"], properties: dict, plan: Plan, configuration: Configuration, labels: Labels
) -> Integer[np.ndarray, "x y z"]:
    """Label map of the original image: interpolate, decide, undo crop and transpose (nnU-Net's export).

    Args:
        logits: network outputs on the preprocessed grid.
        properties: as `preprocess_case` returns them: spacing, shape_before_cropping, bbox_used_for_cropping,
            shape_after_cropping_and_before_resampling.

    Returns:
        uint8 (uint16 or int32 where labels need it), axes in the image file's array order, labels as the dataset's
        files number them.
    """
    decide = decide_regions if labels.has_regions else decide_classes
    decided = decide(logits, _grids(properties, plan, configuration), output_values(labels))
    whole = np.zeros(tuple(properties["shape_before_cropping"]), decided.dtype)
    whole[_box(properties)] = decided
    return np.ascontiguousarray(whole.transpose(plan.transpose_backward))


def restore_probabilities(
    logits: Float[np.ndarray, "k d h w"], properties: dict, plan: Plan, configuration: Configuration, labels: Labels
) -> Float[np.ndarray, "k x y z"]:
    """Class probabilities in the frame of the original image, float32: softmax, or sigmoid with regions.

    Outside the crop background has probability 1 (softmax) or every region 0. Holds all classes at full resolution.
    """
    grids = _grids(properties, plan, configuration)
    axes = axis_taps(logits.shape[1:], grids)
    inside = np.empty((len(logits), *grids.shape), np.float32)
    for k, logit in enumerate(logits):
        inside[k] = interpolate(logit, axes)
    if labels.has_regions:
        np.exp(np.minimum(-inside, 80, out=inside), out=inside)
        np.divide(1, 1 + inside, out=inside)
    else:
        inside -= inside.max(axis=0)
        np.exp(inside, out=inside)
        inside /= inside.sum(axis=0)
    whole = np.zeros((len(logits), *properties["shape_before_cropping"]), np.float32)
    if not labels.has_regions:
        whole[0] = 1
    whole[(slice(None), *_box(properties))] = inside
    return np.ascontiguousarray(whole.transpose(0, *(axis + 1 for axis in plan.transpose_backward)))


def decide_classes(
    logits: Float[np.ndarray, "k d h w"], grids: Grids, values: Sequence[int]
) -> Integer[np.ndarray, "d2 h2 w2"]:
    """Value of the class with the largest interpolated logit at each voxel; the first of equals.

    Interpolated, a class can only win next to a voxel where it beats background, so it is interpolated in the box of
    those voxels alone: the cost follows the volume of the structures, not their number.
    """
    axes = axis_taps(logits.shape[1:], grids)
    best = interpolate(logits[0], axes).copy()
    decided = np.full(best.shape, values[0], _label_type(values))
    for k in range(1, len(logits)):
        for target, rival in _interpolated_where(logits[k] > logits[0], logits[k], axes):
            wins = rival > best[target]
            best[target][wins] = rival[wins]
            decided[target][wins] = values[k]
    return decided


def decide_regions(
    logits: Float[np.ndarray, "k d h w"], grids: Grids, values: Sequence[int]
) -> Integer[np.ndarray, "d2 h2 w2"]:
    """Write each region's value in order where its interpolated logit is above 0 (probability above one half)."""
    axes = axis_taps(logits.shape[1:], grids)
    decided = np.zeros(grids.shape, _label_type(values))
    for k, value in enumerate(values):
        for target, logit in _interpolated_where(logits[k] > 0, logits[k], axes):
            decided[target][logit > 0] = value
    return decided


def _interpolated_where(
    candidate: np.ndarray, logit: np.ndarray, axes: Sequence[Taps]
) -> Iterator[tuple[Box, np.ndarray]]:
    """Yield (box of the new grid, logits there) for the box whose interpolation reads a candidate voxel, if any does."""
    source, target, part = [], [], []
    for axis, taps in enumerate(axes):
        hit = candidate.any(axis=tuple(a for a in range(3) if a != axis))
        writes = np.flatnonzero(hit[taps.low] | hit[taps.high])
        if not len(writes):  # no candidate, or one that shrinking steps over
            return
        new = slice(int(writes[0]), int(writes[-1]) + 1)
        old = slice(int(taps.low[new.start]), int(taps.high[new.stop - 1]) + 1)
        source.append(old)
        target.append(new)
        part.append(Taps(taps.low[new] - old.start, taps.high[new] - old.start, taps.share[new]))
    yield tuple(target), interpolate(logit[tuple(source)], part)


def axis_taps(shape: Size, grids: Grids) -> list[Taps]:
    """How to interpolate each axis: linearly, or nearest along the coarse axis (nnU-Net's resampling, order 1).

    Voxel centres are at half-integers; values beyond the border are the border's.
    """
    coarse = coarse_axis(grids.spacing, grids.new_spacing)
    axes = []
    for axis, (old, new) in enumerate(zip(shape, grids.shape, strict=True)):
        position = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
        low = np.floor(position).astype(np.intp)
        share = position - low
        if axis == coarse:
            low, share = low + (share >= 0.5), np.zeros(new)  # halves go up, as scipy's nearest neighbour
        axes.append(Taps(low, low + (share > 0), share.astype(np.float32)))
    return axes


def interpolate(x: Float[np.ndarray, "d h w"], axes: Sequence[Taps]) -> Float[np.ndarray, "d2 h2 w2"]:
    """Interpolate axis by axis, shrinking axes first; an axis that stays as it is costs nothing (`x` may be returned).

    Plain gathers: several times faster than splines or matrix products, which also wait for each other when cores are busy.
    """
    for axis in sorted(range(3), key=lambda a: len(axes[a].low) / x.shape[a]):
        taps = axes[axis]
        if len(taps.low) == x.shape[axis] and not taps.share.any():
            continue
        low = np.take(x, taps.low, axis=axis)
        if taps.share.any():
            high = np.take(x, taps.high, axis=axis)
            high -= low
            high *= np.expand_dims(taps.share, tuple(a for a in range(3) if a != axis))
            low += high
        x = low
    return x


def output_values(labels: Labels) -> tuple[int, ...]:
    """Label that each network output stands for, by the number that the dataset's files use."""
    inside = labels.regions_class_order if labels.has_regions else labels.all_labels
    return tuple(int(value) for value in labels.decode(np.asarray(inside)))


def _label_type(values: Sequence[int]) -> type:
    if min(values) < 0 or max(values) >= 2**16:
        return np.int32
    return np.uint8 if max(values) < 255 else np.uint16


def _box(properties: dict) -> Box:
    return tuple(slice(low, high) for low, high in properties["bbox_used_for_cropping"])


def _grids(properties: dict, plan: Plan, configuration: Configuration) -> Grids:
    original = tuple(float(properties["spacing"][axis]) for axis in plan.transpose_forward)
    shape = tuple(int(n) for n in properties["shape_after_cropping_and_before_resampling"])
    return Grids(shape, target_spacing(configuration, original), original)
