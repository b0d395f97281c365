"""Raw case to stored case: transpose, crop, normalise, resample, remember where the classes are; nnU-Net's order.

Worker processes import this module, so nothing here may import jax.
"""

import errno
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

from pgps_jax.data.dataset import Case, Dataset, RawCase, check_finite, fitting_workers, read_case
from pgps_jax.data.labels import Label, Labels
from pgps_jax.data.nifti import read_header
from pgps_jax.data.plan import Configuration, Plan, check_preprocessing
from pgps_jax.data.resample import (
    Spacing,
    crop_to_nonzero,
    ct_statistics,
    normalise,
    resample_image,
    resample_segmentation,
    resampled_shape,
)
from pgps_jax.data.store import Preprocessed, remove_leftovers, stored_by_nnunet, stored_from, write_case
from pgps_jax.errors import InputError
from pgps_jax.host_memory import gib, host_bytes_left

_FORMAT = 1  # raise it when preprocessing changes what it writes: stored cases are then made again
_COMPRESSED_SHARE = 0.5  # of the uncompressed size; the least that real images have been seen to need is about this
_FEWEST_LOCATIONS, _SHARE_OF_LOCATIONS = 10_000, 0.01
_THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Progress = Callable[[int, int], None]  # (done, total)


def preprocess_case(raw: RawCase, plan: Plan, configuration: Configuration, labels: Labels) -> Preprocessed:
    """What the network sees of one case, equal to nnU-Net's DefaultPreprocessor.

    The axes are permuted by the plan's `transpose_forward`, the image is cut to its non-zero box, normalised, and then
    resampled to the configuration's spacing (normalisation comes first on purpose). `properties` tells how to go back.
    Raises InputError for a plan that asks for anything else.
    """
    check_preprocessing(configuration)
    image = raw.image.transpose(0, *(1 + axis for axis in plan.transpose_forward))
    label = None if raw.label is None else raw.label.transpose(0, *(1 + axis for axis in plan.transpose_forward))
    spacing = tuple(raw.spacing[axis] for axis in plan.transpose_forward)
    before_cropping = image.shape[1:]
    image, seg, box = crop_to_nonzero(image, label)
    after_cropping = image.shape[1:]
    image = normalise(
        image, seg, configuration.normalization_schemes, configuration.use_mask_for_norm, plan.intensity_properties
    )
    target = target_spacing(configuration, spacing)
    shape = resampled_shape(after_cropping, spacing, target)
    if min(shape) < 1:
        raise InputError(
            f"resampling from {after_cropping} voxels of {spacing} mm to {target} mm leaves no voxel on an axis; the "
            "spacing in the file or the planned spacing is wrong."
        )
    image = resample_image(image, shape, spacing, target)
    seg = resample_segmentation(seg, shape, spacing, target)
    properties = {
        "spacing": [float(s) for s in raw.spacing],
        "shape_before_cropping": list(before_cropping),
        "bbox_used_for_cropping": [list(side) for side in box],
        "shape_after_cropping_and_before_resampling": list(after_cropping),
        "nibabel_stuff": {"original_affine": np.asarray(raw.affine, float).tolist()},
    }
    return Preprocessed(image, seg, properties, sample_locations(seg, labels))


def target_spacing(configuration: Configuration, spacing: Spacing) -> Spacing:
    """Planned spacing in mm for a case of this spacing (both transposed); 2D configurations keep the slice distance."""
    return (spacing[0], *configuration.spacing[1:]) if configuration.is_2d else configuration.spacing


def sample_locations(seg: Integer[np.ndarray, "1 d h w"], labels: Labels) -> dict[Label, np.ndarray]:
    """Voxels (n, 3) of every foreground class or region, from which forced-foreground patches choose their centre.

    n = max(min(10000, all), ceil(0.01 all)) per class, drawn without replacement, the same ones every time; nnU-Net's
    rule. With an ignore label, the last key (-1, 0, 1, ...) holds annotated voxels.
    """
    rng = np.random.RandomState(1234)
    flat = seg.reshape(-1)
    foreground = np.flatnonzero(flat > 0)
    values = flat[foreground]

    def voxels_of(value: int) -> np.ndarray:
        return foreground[values == value] if value > 0 else np.flatnonzero(flat == value)

    annotated = () if labels.ignore is None else ((-1, *labels.all_labels),)
    locations: dict[Label, np.ndarray] = {}
    for label in (*labels.foreground, *annotated):
        members = label if isinstance(label, tuple) else (label,)
        locations[label] = _draw(np.concatenate([voxels_of(value) for value in members]), seg.shape[1:], rng)
    return locations


def _draw(voxels: np.ndarray, shape: tuple[int, ...], rng: np.random.RandomState) -> np.ndarray:
    n = max(min(_FEWEST_LOCATIONS, len(voxels)), math.ceil(_SHARE_OF_LOCATIONS * len(voxels)))
    chosen = voxels[rng.choice(len(voxels), n, replace=False)] if n else voxels
    return np.stack(np.unravel_index(chosen, shape), axis=1).astype(np.int32)


# ----------------------------------------------------------------------------------------------------------- a dataset


def preprocess_dataset(
    dataset: Dataset,
    plan: Plan,
    configuration: Configuration,
    folder: Path,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Store every case of the dataset in `folder` (see `CaseStore`), several at once in fresh processes.

    Restartable: cases that are complete and were made from the same files by the same plan are skipped, and so are
    cases that nnU-Net put there. A worker holds one case at a time. With one worker no process is started.

    Args:
        workers: processes; default one per core, or as many as fit into the free memory.
        progress: called with (cases done, cases in all), first with those already there.

    Raises:
        InputError: too little disk space (said before any work), or cases that cannot be processed, each named with
            its cause after the others are done.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made_from = {case.id: _made_from(case, plan, configuration, dataset.labels) for case in dataset.cases}
    todo = [case for case in dataset.cases if not _is_done(folder, case, made_from[case.id])]
    sizes = [_sizes(case, plan, configuration) for case in todo]
    check_disk_space(folder, todo, sizes)
    for channel, scheme in enumerate(configuration.normalization_schemes):
        if scheme == "CTNormalization":
            ct_statistics(plan.intensity_properties, channel)
    remove_leftovers(folder)
    fitting = fitting_workers(_bytes_needed(case, size) for case, size in zip(todo, sizes, strict=True))
    done = len(dataset.cases) - len(todo)
    if progress:
        progress(done, len(dataset.cases))
    tasks = [(case, plan, configuration, dataset.labels, folder, made_from[case.id]) for case in todo]
    failures = []
    for failure in _run(tasks, min(workers or fitting, len(tasks))):
        failures += [failure] if failure else []
        done += 1
        if progress:
            progress(done, len(dataset.cases))
    if failures:
        raise InputError(
            f"{len(failures)} of {len(dataset.cases)} cases could not be preprocessed; the others are stored. "
            + " ".join(sorted(failures)[:10])
            + (" ..." if len(failures) > 10 else "")
        )


def keep_references(dataset: Dataset, folder: Path) -> None:
    """Copies of the reference labels in `folder`; a copy whose size or time is not that of its label is made again."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in dataset.cases:
        target = folder / f"{case.id}{dataset.file_ending}"
        if not target.exists() or _size_and_time(target) != _size_and_time(case.label):
            temporary = target.with_name(f".{os.getpid()}.{target.name}")
            try:
                shutil.copy2(case.label, temporary)  # with its time
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)


def _size_and_time(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


class _Sizes(NamedTuple):
    """Voxels of a case in its files, and as it will be stored (without the crop, which only the voxels tell)."""

    raw: int
    stored: int


def _sizes(case: Case, plan: Plan, configuration: Configuration) -> _Sizes:
    header = read_header(case.images[0])
    shape = tuple(header.shape[axis] for axis in plan.transpose_forward)
    spacing = tuple(header.spacing[axis] for axis in plan.transpose_forward)
    return _Sizes(math.prod(shape), math.prod(resampled_shape(shape, spacing, target_spacing(configuration, spacing))))


def _bytes_needed(case: Case, size: _Sizes) -> int:
    """Memory that preprocessing takes at most: channels as read and normalised, then as resampled and read back; masks, labels."""
    return size.raw * (8 * len(case.images) + 24) + size.stored * (8 * len(case.images) + 16)


def check_disk_space(folder: Path, cases: list[Case], sizes: list[_Sizes]) -> None:
    """Refuse to start when the cases, compressed, will hardly fit on the folder's disk."""
    needed = sum(size.stored * (4 * len(case.images) + 2) for case, size in zip(cases, sizes, strict=True))
    free = shutil.disk_usage(folder).free
    least = needed * _COMPRESSED_SHARE
    if least > free:
        raise InputError(
            f"Preprocessing {len(cases)} cases needs {least / 1e9:.2f} to {needed / 1e9:.2f} GB in {folder}, where "
            f"{free / 1e9:.2f} GB are free; free some space or choose another --workspace."
        )


def _is_done(folder: Path, case: Case, made_from: str) -> bool:
    stored = stored_from(folder, case.id)
    return stored_by_nnunet(folder, case.id) if stored is None else stored == made_from


def _made_from(case: Case, plan: Plan, configuration: Configuration, labels: Labels) -> str:
    """Fingerprint of all that the stored case depends on."""
    files = [path for path in (*case.images, case.label) if path is not None]
    try:
        stats = [path.stat() for path in files]
    except OSError as error:
        raise InputError(f"Case {case.id}: {error.filename} cannot be read ({error.strerror}).") from error
    parts = [
        _FORMAT,
        [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in zip(files, stats, strict=True)],
        plan.transpose_forward,
        plan.intensity_properties,
        [configuration.spacing, configuration.normalization_schemes, configuration.use_mask_for_norm],
        [labels.values, labels.ignore],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _run(tasks: list[tuple], workers: int) -> Iterator[str | None]:
    """Do each task, in any order; yields None or what was wrong with its input."""
    if workers <= 1:
        yield from (_preprocess_and_store(*task) for task in tasks)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    futures: dict[Future, str] = {}
    try:
        with _lean_processes():
            for task in tasks:
                futures[pool.submit(_preprocess_and_store, *task)] = task[0].id
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        unfinished = [case_id for future, case_id in futures.items() if future.exception()] or [task[0].id for task in tasks]
        raise InputError(
            "A preprocessing process was killed, most likely because memory ran out, in one of the cases "
            f"{', '.join(unfinished[:workers])}; {gib(host_bytes_left())} are free now. "
            f"Start again with fewer --workers (now {workers}); the cases already done are kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _lean_processes() -> Iterator[None]:
    """Processes started meanwhile calculate with one thread each and do not import the program that starts them.

    There is already one process per core. And the program, `__main__`, imports jax, or is a script that would run again.
    """
    added = [name for name in _THREAD_LIMITS if name not in os.environ]
    os.environ.update(dict.fromkeys(added, "1"))
    program = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")  # without a file: nothing to import
    try:
        yield
    finally:
        sys.modules["__main__"] = program
        for name in added:
            os.environ.pop(name, None)


def _preprocess_and_store(
    case: Case, plan: Plan, configuration: Configuration, labels: Labels, folder: Path, made_from: str
) -> str | None:
    try:
        raw = read_case(case, labels)
        for path, channel in zip(case.images, raw.image, strict=True):
            check_finite(case, path, channel)
        preprocessed = preprocess_case(raw, plan, configuration, labels)
        del raw  # its memory is needed for writing
        write_case(folder, case.id, preprocessed, configuration.patch_size, made_from)
    except (InputError, OSError, MemoryError) as error:
        reason = str(error)
        if isinstance(error, MemoryError):
            shape = "x".join(map(str, read_header(case.images[0]).shape))
            reason = (f"memory ran out with {len(case.images)} channels of {shape} voxels, {gib(host_bytes_left())} are free; "
                      "use fewer --workers.")
        elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
            reason = f"the disk of {folder} is full."
        known = "" if case.id in reason else f"Case {case.id} ({case.images[0]}): "
        return f"{known}{reason}"
    except Exception as error:
        error.add_note(f"while preprocessing case {case.id} ({case.images[0]})")
        raise
    return None
