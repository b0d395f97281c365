"""Let nnU-Net train from a folder of ours: write the pickles that its dataset class needs beside the arrays.

This is the only place that writes pickles. nnU-Net reads case properties from nothing else; they hold plain values and
NumPy arrays. We never read ours back: the JSON stays and is preferred.
"""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pgps_jax.data.store import CaseStore, Preprocessed, StoredCase
from pgps_jax.errors import InputError


def export_properties(folder: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Write CASE.pkl for every case of a preprocessed folder; nnU-Net 2.6 and later can then train from the folder.

    Args:
        progress: called with (cases done, cases in all).

    Raises:
        InputError: the folder does not exist or holds no cases, or a case is damaged.
    """
    store = CaseStore(Path(folder))
    if not store.ids:
        inner = sorted(path.parent.name for path in store.folder.glob("*/properties"))
        raise InputError(f"{folder}: holds no preprocessed cases"
                         + (f"; name one of the folders in it: {', '.join(inner)}" if inner else "; preprocess the dataset first"))
    for done, case_id in enumerate(store.ids, start=1):
        write_properties(store.folder / f"{case_id}.pkl", store.open(case_id))
        if progress:
            progress(done, len(store.ids))


def write_properties(path: Path, case: StoredCase | Preprocessed) -> None:
    """Write one case's properties as nnU-Net's pickle, atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(pickle.dumps(nnunet_properties(case)))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def nnunet_properties(case: StoredCase | Preprocessed) -> dict:
    """A case's properties under nnU-Net's keys: geometry for both of its NIfTI readers, locations with channel 0."""
    properties = {
        key: case.properties[key]
        for key in ("spacing", "bbox_used_for_cropping", "shape_before_cropping",
                    "shape_after_cropping_and_before_resampling")
    }  # fmt: skip
    affine = np.array(case.properties["nibabel_stuff"]["original_affine"], np.float64)
    return {
        **properties,
        "shape_before_cropping": tuple(properties["shape_before_cropping"]),
        "shape_after_cropping_and_before_resampling": tuple(properties["shape_after_cropping_and_before_resampling"]),
        "nibabel_stuff": {"original_affine": affine},
        "sitk_stuff": _sitk_of_affine(affine),
        "class_locations": {
            label: np.pad(np.asarray(voxels, np.int64), ((0, 0), (1, 0))) if len(voxels) else []
            for label, voxels in case.locations.items()
        },
    }


def _sitk_of_affine(affine: np.ndarray) -> dict[str, tuple[float, ...]]:
    """SimpleITK's geometry (left, posterior, superior) of a NIfTI affine (right, anterior, superior)."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    direction = lps[:3, :3] / spacing
    return {
        "spacing": tuple(spacing.tolist()),
        "origin": tuple(lps[:3, 3].tolist()),
        "direction": tuple(direction.reshape(-1).tolist()),
    }
