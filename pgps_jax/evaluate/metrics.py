"""Overlap of one predicted label map with its reference: nnU-Net's counts, Dice and IoU."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from pgps_jax.data.labels import Label

Metrics = dict[str, float | int]


def overlap_metrics(
    prediction: Integer[np.ndarray, "d h w"],
    reference: Integer[np.ndarray, "d h w"],
    labels: Sequence[Label],
    ignore: int | None = None,
) -> dict[Label, Metrics]:
    """Voxel counts and overlap of each label or region.

    Dice = 2 TP / (2 TP + FP + FN) and IoU = TP / (TP + FP + FN); both are NaN where neither side has the label. Voxels
    that hold `ignore` in the reference are left out of all counts.

    One pass over the voxels counts every pair of labels; the rest is sums over that table, however many labels there
    are and however they overlap.
    """
    values, table = confusion(prediction, reference, ignore)
    total = int(table.sum())
    metrics = {}
    for label in labels:
        member = np.isin(values, label)
        tp = int(table[np.ix_(member, member)].sum())
        n_pred, n_ref = int(table[member].sum()), int(table[:, member].sum())
        metrics[label] = _metrics_of_counts(tp, n_pred - tp, n_ref - tp, total - n_pred - n_ref + tp)
    return metrics


def confusion(
    prediction: Integer[np.ndarray, "d h w"], reference: Integer[np.ndarray, "d h w"], ignore: int | None = None
) -> tuple[Integer[np.ndarray, "n"], Integer[np.ndarray, "n n"]]:
    """Values that occur (ascending), and how many voxels are predicted as the row's and are truly the column's value.

    With `ignore`, voxels with that reference are not counted.
    """
    if ignore is not None:
        kept = reference != ignore
        prediction, reference = prediction[kept], reference[kept]
    prediction, reference = prediction.reshape(-1), reference.reshape(-1)
    if not reference.size:
        return np.zeros(0, np.intp), np.zeros((0, 0), np.intp)
    lowest = min(int(prediction.min()), int(reference.min()))
    size = max(int(prediction.max()), int(reference.max())) - lowest + 1
    present = np.zeros(size, bool)
    present[prediction - lowest] = present[reference - lowest] = True
    values = np.flatnonzero(present)
    place = np.zeros(size, np.intp)
    place[values] = np.arange(len(values))
    pairs = place[prediction - lowest] * len(values) + place[reference - lowest]
    return values + lowest, np.bincount(pairs, minlength=len(values) ** 2).reshape(len(values), len(values))


def _metrics_of_counts(tp: int, fp: int, fn: int, tn: int) -> Metrics:
    found = tp + fp + fn > 0
    return {
        "Dice": 2 * tp / (2 * tp + fp + fn) if found else float("nan"),
        "IoU": tp / (tp + fp + fn) if found else float("nan"),
        "TP": tp,
        "FP": fp,
        "FN": fn,
        "TN": tn,
        "n_pred": tp + fp,
        "n_ref": tp + fn,
    }
