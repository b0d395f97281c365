"""From logits on the preprocessed grid back to a label map in the frame of the image file.

Memory does not grow with the number of classes: they are interpolated one after the other against the best so far, each
only where it can win, and never held together at full resolution.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from pgps_jax.architecture import Size
from pgps_jax.data.dataset import Labels
from pgps_jax.data.plan import Configuration, Plan
from pgps_jax.data.preprocess import target_spacing
from pgps_jax.data.resample import Spacing, coarse_axis, resample_probabilities, resample_volume

Box = tuple[slice, slice, slice]


class Grids(NamedTuple):
    """The way back: shape to reach, spacing of the preprocessed grid and of the original one; transposed axes."""

    shape: Size
    spacing: Spacing
    new_spacing: Spacing


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
    inside = np.array(resample_probabilities(logits, *_grids(properties, plan, configuration)))
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
    best = resample_volume(logits[0], *grids, order=1)
    weights = axis_weights(logits.shape[1:], grids)
    decided = np.full(best.shape, values[0], _label_type(values))
    for k in range(1, len(logits)):
        for target, rival in _interpolated_where(logits[k] > logits[0], logits[k], weights):
            wins = rival > best[target]
            best[target][wins] = rival[wins]
            decided[target][wins] = values[k]
    return decided


def decide_regions(
    logits: Float[np.ndarray, "k d h w"], grids: Grids, values: Sequence[int]
) -> Integer[np.ndarray, "d2 h2 w2"]:
    """Write each region's value in order where its interpolated logit is above 0 (probability above one half)."""
    weights = axis_weights(logits.shape[1:], grids)
    decided = np.zeros(grids.shape, _label_type(values))
    for k, value in enumerate(values):
        for target, logit in _interpolated_where(logits[k] > 0, logits[k], weights):
            decided[target][logit > 0] = value
    return decided


def _interpolated_where(candidate: np.ndarray, logit: np.ndarray, weights: Sequence[np.ndarray]):
    """Yield (box of the new grid, logits there) for the one box whose interpolation sees a candidate voxel, if any."""
    source, target = [], []
    for axis, weight in enumerate(weights):
        hit = candidate.any(axis=tuple(a for a in range(3) if a != axis))
        writes = np.flatnonzero(weight[:, hit].any(axis=1))
        if not len(writes):  # no candidate, or one that shrinking steps over
            return
        target.append(slice(int(writes[0]), int(writes[-1]) + 1))
        reads = np.flatnonzero(weight[target[-1]].any(axis=0))
        source.append(slice(int(reads[0]), int(reads[-1]) + 1))
    part = [weight[new, old] for weight, new, old in zip(weights, target, source, strict=True)]
    yield tuple(target), _interpolate(logit[tuple(source)], part)


def axis_weights(shape: Size, grids: Grids) -> list[Float[np.ndarray, "new old"]]:
    """Interpolation matrices per axis: linear, or nearest along the coarse axis (nnU-Net's resampling, order 1).

    Voxel centres are at half-integers; values beyond the border are the border's.
    """
    coarse = coarse_axis(grids.spacing, grids.new_spacing)
    matrices = []
    for axis, (old, new) in enumerate(zip(shape, grids.shape, strict=True)):
        rows = np.arange(new)
        position = np.clip((rows + 0.5) * (old / new) - 0.5, 0, old - 1)
        low = np.floor(position).astype(int)
        share = position - low
        if axis == coarse:
            share = np.floor(share + 0.5)  # nearest neighbour; halves go up, as scipy's
        matrix = np.zeros((new, old), np.float32)
        matrix[rows, low] = 1 - share
        matrix[rows, np.minimum(low + 1, old - 1)] += share
        matrices.append(matrix)
    return matrices


def _interpolate(x: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """Apply one matrix per axis, last axis first; an axis that stays as it is costs nothing."""
    along_d, along_h, along_w = (None if _is_identity(w) else w for w in weights)
    if along_w is not None:
        x = x @ along_w.T
    if along_h is not None:
        x = along_h @ x
    if along_d is not None:
        x = (along_d @ x.reshape(len(x), -1)).reshape(-1, *x.shape[1:])
    return x


def _is_identity(weight: np.ndarray) -> bool:
    return weight.shape[0] == weight.shape[1] and bool((weight == np.eye(len(weight), dtype=np.float32)).all())


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
