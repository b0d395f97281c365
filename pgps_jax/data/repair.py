"""Safe repairs of what the doctor found, written as a new dataset; the original is never touched.

Safe means that one cure is right beyond doubt, or that the image itself tells which of two it is. What needs a person's
decision is copied as it is, and stays in the doctor's report of the new dataset.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from pgps_jax.data.doctor import CLEARLY, LEAST_FIT, CaseFacts, Examination, Progress, fit, flipped_axes, header_of
from pgps_jax.data.nifti import Volume, geometry_difference, read_channels, read_volume, same_spacing, write_volume
from pgps_jax.errors import InputError
from pgps_jax.json_file import write_json

ROUNDING = 1e-3  # distance to an integer that is a rounding error
SAME_GRID = 0.5  # voxels: headers less apart mean the same grid


class Repair(NamedTuple):
    """What was done to a case ("" for dataset.json)."""

    case: str
    action: str


def repair(examination: Examination, out: Path, progress: Progress | None = None) -> list[Repair]:
    """Write a copy of the examined dataset to `out` with all safe repairs; also repairs.json, what was done.

    Repaired are: numTraining; 4D files with one entry per channel (split into channels); headers that are off by less
    than half a voxel (the image's is copied); labels on another grid (nearest neighbour, if no foreground is lost);
    labels whose header is reversed (turned, or header copied, whichever fits the image clearly better); rounding errors
    in labels.

    Raises:
        InputError: `out` is not empty or lies in the dataset; the dataset names its files by the key `dataset`.
    """
    out = Path(out).resolve()
    if out.is_relative_to(examination.folder):
        raise InputError(f"{out}: lies in the dataset that it is a repaired copy of; choose another folder")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty; a repaired dataset is written to a new folder")
    if "dataset" in examination.json:
        raise InputError('the dataset lists its files under the key "dataset" of dataset.json; such are not repaired')
    ending = examination.json.get("file_ending", ".nii.gz")
    (out / "imagesTr").mkdir(parents=True, exist_ok=True)
    (out / "labelsTr").mkdir(exist_ok=True)
    done: list[Repair] = []
    for number, case in enumerate(examination.cases):
        done += _repair_case(case, len(examination.channel_names), out, ending)
        if progress is not None:
            progress(number + 1, len(examination.cases))
    for extra in ("splits_final.json",):
        if (examination.folder / extra).exists():
            shutil.copy2(examination.folder / extra, out / extra)
    content = dict(examination.json)
    trained = sum(bool(case.files.images) for case in examination.cases)
    if content.get("numTraining") != trained:
        done.append(Repair("", f"numTraining set from {content.get('numTraining')!r} to {trained}"))
        content["numTraining"] = trained
    write_json(out / "repairs.json", [repair._asdict() for repair in done], indent=1)
    write_json(out / "dataset.json", content, indent=1)  # last: the folder is a dataset only when it is complete
    return done


def _repair_case(case: CaseFacts, num_channels: int, out: Path, ending: str) -> list[Repair]:
    kinds = {problem.kind for problem in case.problems}
    done: list[Repair] = []
    images = dict(case.files.images)
    if "four-dimensional" in kinds and len(images) == 1:
        channels, affine = _entries(images[0])
        if channels is not None and len(channels) == num_channels:
            for number, channel in enumerate(channels):
                write_volume(out / "imagesTr" / f"{case.id}_{number:04d}{ending}", channel, affine)
            done.append(Repair(case.id, f"{images[0].name} split into {num_channels} channels"))
            images = {}
    touched = {"geometry-mismatch", "shape-mismatch", "flipped-axis", "fractional-label"} & kinds
    first = _readable(case.files.images.get(0)) if touched else None
    for path in images.values():
        volume = _readable(path) if first is not None and path != images.get(0) else None
        if volume is not None and _only_rounding(first, volume):
            write_volume(out / "imagesTr" / path.name, volume.array, first.affine)
            done.append(Repair(case.id, f"{path.name}: header of {images[0].name} copied"))
        else:
            shutil.copy2(path, out / "imagesTr" / path.name)
    if case.files.label is not None:
        done += _repair_label(case.id, case.files.label, first, out / "labelsTr" / case.files.label.name)
    return done


def _repair_label(case: str, path: Path, first: Volume | None, target: Path) -> list[Repair]:
    label = _readable(path) if first is not None else None
    actions = []
    if label is not None and np.isfinite(label.array).all():
        whole = np.round(label.array)
        off = np.abs(label.array - whole).max()
        if 0 < off <= ROUNDING:
            label = label._replace(array=whole)
            actions.append("rounded to integers")
        if off <= ROUNDING and (regridded := _regridded(first, label)) is not None:
            label = label._replace(array=regridded[0], affine=first.affine)
            actions.append(regridded[1])
    if not actions:
        shutil.copy2(path, target)
        return []
    write_volume(target, label.array.astype(np.int32), label.affine)
    return [Repair(case, f"{path.name}: {action}") for action in actions]


def _regridded(first: Volume, label: Volume) -> tuple[np.ndarray, str] | None:
    """The label on the image's grid and how it got there; None if it is there already or nothing safe can be done."""
    mine, images = header_of(label), header_of(first)
    if flips := flipped_axes(images, mine):
        turned = np.flip(label.array, flips)
        as_it_is, other = fit(first.array, label.array > 0), fit(first.array, turned > 0)
        if max(as_it_is, other) < LEAST_FIT or max(as_it_is, other) < CLEARLY * min(as_it_is, other):
            return None
        if other > as_it_is:
            return turned, f"turned along array axis {', '.join(map(str, flips))}"
        return label.array, "header of the image copied"
    if mine.shape == images.shape and geometry_difference(images, mine) == 0 and same_spacing(images, mine):
        return None
    if _only_rounding(first, label):
        return label.array, "header of the image copied"
    if mine.shape != images.shape:
        return _resampled(first, label)
    return None


def _only_rounding(first: Volume, other: Volume) -> bool:
    """Same grid, and headers that differ by less than half a voxel but do differ."""
    mine, images = header_of(other), header_of(first)
    if images.shape != mine.shape:
        return False
    off = geometry_difference(images, mine)
    return off < SAME_GRID * min(first.spacing) and (off > 0 or not same_spacing(images, mine))


def _resampled(first: Volume, label: Volume) -> tuple[np.ndarray, str] | None:
    """Nearest neighbour by world position, unless that loses foreground at the image's border."""
    flip = np.eye(4)[[2, 1, 0, 3]]  # between voxel (x, y, z) and array (d, h, w)
    image_to_label = flip @ np.linalg.inv(label.affine) @ first.affine @ flip
    inside = ndimage.affine_transform(
        label.array, image_to_label, output_shape=first.array.shape, order=0, mode="constant", cval=0)
    indices = np.argwhere(label.array > 0)
    if len(indices):
        corners = np.c_[indices, np.ones(len(indices))] @ np.linalg.inv(image_to_label).T
        lost = ((corners[:, :3] < -0.5) | (corners[:, :3] > np.array(first.array.shape) - 0.5)).any(axis=1).mean()
        if lost > 0 or not inside.any():
            return None
    return inside, f"resampled to the image's grid, {' x '.join(map(str, first.array.shape))} voxels"


def _readable(path: Path | None) -> Volume | None:
    try:
        return None if path is None else read_volume(path)
    except InputError:
        return None


def _entries(path: Path) -> tuple[np.ndarray | None, np.ndarray | None]:
    try:
        return read_channels(path)
    except InputError:
        return None, None
