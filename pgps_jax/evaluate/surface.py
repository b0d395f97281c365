"""Distances between surfaces, and lesions found or missed: measures beyond nnU-Net's, asked for by name.

Surface distances come from DeepMind's `surface_distance` (extra `metrics`), which weighs every piece of surface by its
area; they are in mm.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer
from scipy import ndimage

from pgps_jax.data.labels import Label
from pgps_jax.data.resample import Spacing
from pgps_jax.errors import InputError
from pgps_jax.evaluate.metrics import Metrics


def surface_metrics(
    prediction: Integer[np.ndarray, "d h w"],
    reference: Integer[np.ndarray, "d h w"],
    labels: Sequence[Label],
    spacing: Spacing,
    tolerance: float,
    ignore: int | None = None,
) -> dict[Label, Metrics]:
    """Distances between the two surfaces of each label or region.

    * HD95: the larger of both directions' 95th percentile of distances, in mm.
    * ASSD: mean distance over both surfaces, in mm.
    * NSD: share of both surfaces that lies within `tolerance` mm of the other (surface Dice).

    Where only one side has the label, distances are the diagonal of the volume and NSD is 0; where neither has it, all
    are NaN. Voxels that hold `ignore` in the reference count as background on both sides.

    Raises:
        InputError: the library is not installed.
    """
    library = _surface_distance()
    diagonal = float(np.linalg.norm(np.multiply(reference.shape, spacing)))
    valid = True if ignore is None else reference != ignore
    metrics = {}
    for label in labels:
        predicted, true = np.isin(prediction, label) & valid, np.isin(reference, label) & valid
        if not predicted.any() or not true.any():
            neither = not predicted.any() and not true.any()
            worst = float("nan") if neither else diagonal
            metrics[label] = {"HD95": worst, "ASSD": worst, "NSD": float("nan") if neither else 0.0}
            continue
        box = ndimage.find_objects((predicted | true).astype(np.uint8))[0]
        box = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
        distances = library.compute_surface_distances(true[box], predicted[box], spacing)
        metrics[label] = {
            "HD95": float(library.compute_robust_hausdorff(distances, 95)),
            "ASSD": _mean_distance(distances),
            "NSD": float(library.compute_surface_dice_at_tolerance(distances, tolerance)),
        }
    return metrics


def _surface_distance() -> Any:
    try:
        import surface_distance
    except ImportError:
        raise InputError(
            "Surface distances need the package surface-distance-based-measures; install it with: "
            'pip install "pgps_jax[metrics]"'
        ) from None
    return surface_distance


def _mean_distance(distances: dict[str, np.ndarray]) -> float:
    values = np.concatenate([distances["distances_gt_to_pred"], distances["distances_pred_to_gt"]])
    areas = np.concatenate([distances["surfel_areas_gt"], distances["surfel_areas_pred"]])
    return float(np.average(values, weights=areas))


def lesion_metrics(
    prediction: Integer[np.ndarray, "d h w"],
    reference: Integer[np.ndarray, "d h w"],
    labels: Sequence[Label],
    ignore: int | None = None,
) -> dict[Label, Metrics]:
    """How many separate structures of each label or region were found.

    A lesion is a connected component (voxels may touch by a corner). A true lesion is found when any of its voxels is
    predicted; a predicted one is false when it touches no true voxel. LesionF1 = 2 found / (2 found + missed + false),
    NaN where there are no lesions on either side. Voxels that hold `ignore` in the reference count as background.
    """
    valid = True if ignore is None else reference != ignore
    metrics = {}
    for label in labels:
        predicted, true = np.isin(prediction, label) & valid, np.isin(reference, label) & valid
        found, missed = _touched(true, predicted)
        _, false = _touched(predicted, true)
        total = 2 * found + missed + false
        metrics[label] = {
            "LesionF1": 2 * found / total if total else float("nan"),
            "lesions_found": found,
            "lesions_missed": missed,
            "lesions_false": false,
        }
    return metrics


def _touched(mask: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    """Number of components of `mask` that contain a voxel of `other`, and of those that do not."""
    components, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    touched = int(np.count_nonzero(np.unique(components[other])))
    return touched, count - touched
