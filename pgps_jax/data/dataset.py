"""A dataset of labelled images in nnU-Net's raw layout: its cases, channels and labels, and the checks before work.

    DATASET/dataset.json   channel_names, labels, numTraining, file_ending, ...
    DATASET/imagesTr/CASE_0000.nii.gz, CASE_0001.nii.gz, ...   one file per channel
    DATASET/labelsTr/CASE.nii.gz
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pgps_jax.data.labels import Labels
from pgps_jax.data.nifti import NIFTI_ENDINGS, SITK_ENDINGS, geometry_difference, read_header, read_volume, same_spacing
from pgps_jax.errors import InputError, brief
from pgps_jax.host_memory import host_bytes_left
from pgps_jax.json_file import read_json

Progress = Callable[[int, int], None]  # (done, total)

GEOMETRY_TOLERANCE = 0.5  # voxels by which the label may lie off its image
MOST_CHANNELS = 10_000  # four digits in a file name
LONGEST_ID = 200  # bytes; file systems allow names of 255, and the id gets a channel number and an ending


@dataclass(frozen=True)
class Case:
    """The files of one scan."""

    id: str
    images: tuple[Path, ...]  # one per channel
    label: Path | None


@dataclass(frozen=True)
class Dataset:
    """A raw dataset whose files are known to exist; nothing is loaded."""

    folder: Path
    name: str
    channel_names: tuple[str, ...]
    labels: Labels
    file_ending: str
    cases: tuple[Case, ...]  # sorted by id
    json: dict  # dataset.json as read, key order kept


def open_dataset(path: Path) -> Dataset:
    """Find the training cases of a dataset folder. Reads dataset.json and file names, no images.

    Raises:
        InputError: missing or invalid dataset.json, missing keys or files, Decathlon layout.
    """
    folder = Path(path).resolve()
    content = read_dataset_json(folder)
    refuse_decathlon(folder, content)
    for key in ("labels", "numTraining", "file_ending"):
        if key not in content:
            raise InputError(f'{folder / "dataset.json"}: the key "{key}" is missing')
    ending, channels = file_ending(folder, content), channel_names(folder, content)
    try:
        labels = Labels.from_json(content)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    find = _explicit_cases if "dataset" in content else _scanned_cases
    cases = find(folder, content, channels)
    if not cases:
        raise InputError(f"{folder}: no training cases found; images are expected as imagesTr/CASE_0000{ending}")
    ids = {case.id for case in cases}
    if clash := sorted(ids & {f"{case_id}_seg" for case_id in ids}):
        raise InputError(f"{folder}: the case name {clash[0]} is what the preprocessed labels of {clash[0].removesuffix('_seg')} are "
                         "called; rename one of the two cases")
    return Dataset(folder, folder.name, channels, labels, ending, cases, content)


def read_dataset_json(folder: Path) -> dict:
    """dataset.json of a folder as it is; InputError if there is none or it is not a JSON object."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a dataset is a folder with dataset.json, imagesTr and labelsTr")
    return read_json(folder / "dataset.json", cure="it names the channels and labels of the dataset")


def refuse_decathlon(folder: Path, content: dict) -> None:
    """Raise InputError for a folder whose dataset.json has the Decathlon's form."""
    if "training" in content and "file_ending" not in content:
        raise InputError(f"{folder} is a Medical Segmentation Decathlon folder; convert it to nnU-Net's layout first: "
                         f"`convert-msd {folder}`")


def check_case_id(case_id: str, where: object) -> None:
    """Refuse an id that cannot be a file name on every machine, or cannot be printed.

    Names of files that are no Unicode reach Python as lone surrogates; line breaks and the like would garble every report.

    Raises:
        InputError: naming `where` the id was found.
    """
    if not re.fullmatch(r"[^/\\.][^/\\]*", case_id) or not case_id.isprintable() or len(case_id.encode()) > LONGEST_ID:
        raise InputError(f"{where}: the case name {brief(case_id)} cannot be a file name; want printable characters without / and \\, "
                         f"no dot in front, at most {LONGEST_ID} bytes. Rename it")


def file_ending(folder: Path, content: dict) -> str:
    """How the names of a dataset's images end, by its dataset.json; InputError if such files are not read."""
    ending = content.get("file_ending")
    if ending not in NIFTI_ENDINGS + SITK_ENDINGS:
        raise InputError(f'{folder / "dataset.json"}: file_ending {brief(ending)} is not read; known are '
                         f"{', '.join(NIFTI_ENDINGS + SITK_ENDINGS)}")
    return ending


def channel_names(folder: Path, content: dict) -> tuple[str, ...]:
    """Names of the image channels by a dataset.json, in order; InputError if they are not numbered from 0."""
    names = content.get("channel_names", content.get("modality"))  # `modality` is what nnU-Net 1 called it
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))} or not names:
        raise InputError(f'{folder / "dataset.json"}: "channel_names" must be an object {{"0": "CT", "1": ...}} '
                         f"numbered from 0 without gaps; found {brief(names)}")
    if len(names) > MOST_CHANNELS or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f'{folder / "dataset.json"}: "channel_names" must name at most {MOST_CHANNELS} channels by text; '
                         f"found {len(names)}: {brief(names)}")
    return tuple(str(names[str(i)]) for i in range(len(names)))


def _scanned_cases(folder: Path, content: dict, channels: tuple[str, ...]) -> tuple[Case, ...]:
    ending, images, labels = content["file_ending"], folder / "imagesTr", folder / "labelsTr"
    for needed in (images, labels):
        if not needed.is_dir():
            raise InputError(f"{needed}: this folder is missing")
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(images.iterdir()):
        if path.name.startswith(".") or not path.name.endswith(ending):
            continue
        match = re.fullmatch(r"(.+)_(\d{4})", path.name.removesuffix(ending))
        if not match:
            raise InputError(f"{path}: an image must be named CASE_0000{ending}, four digits being the channel")
        check_case_id(match[1], images)
        found.setdefault(match[1], {})[int(match[2])] = path
    have_label = {path.name for path in labels.iterdir()}
    cases = []
    for case_id, files in sorted(found.items()):
        for number, name in enumerate(channels):
            if number not in files:
                raise InputError(f"case {case_id}: channel {number} ({name}) is missing; expected the file "
                                 f"{images / f'{case_id}_{number:04d}{ending}'}")
        if surplus := sorted(set(files) - set(range(len(channels)))):
            raise InputError(f"case {case_id}: {files[surplus[0]]} is a channel too many; dataset.json names "
                             f"{len(channels)}: {', '.join(channels)}")
        if f"{case_id}{ending}" not in have_label:
            raise InputError(f"case {case_id}: its label is missing; expected the file {labels / f'{case_id}{ending}'}")
        cases.append(Case(case_id, tuple(files[n] for n in range(len(channels))), labels / f"{case_id}{ending}"))
    return tuple(cases)


def _explicit_cases(folder: Path, content: dict, channels: tuple[str, ...]) -> tuple[Case, ...]:
    """Cases of the `dataset` key; paths relative to the folder, or absolute, with $VARIABLES and ~ expanded."""
    entries = content["dataset"]
    if not isinstance(entries, dict):
        raise InputError(f'{folder / "dataset.json"}: "dataset" must be {{case: {{"images": [...], "label": ...}}}}')

    cases = []
    for case_id, entry in sorted(entries.items()):
        check_case_id(case_id, folder / "dataset.json")
        if not isinstance(entry, dict) or not isinstance(entry.get("images"), list) or "label" not in entry:
            raise InputError(f'case {case_id} in dataset.json: want {{"images": [path per channel], "label": path}}')
        if len(entry["images"]) != len(channels):
            raise InputError(f"case {case_id} in dataset.json: {len(entry['images'])} images for the {len(channels)} "
                             f"channels {', '.join(channels)}")
        images = tuple(explicit_file(folder, case_id, image, content["file_ending"]) for image in entry["images"])
        cases.append(Case(case_id, images, explicit_file(folder, case_id, entry["label"], content["file_ending"])))
    return tuple(cases)


def explicit_file(folder: Path, case_id: str, text: object, ending: str = "") -> Path:
    """A file of the `dataset` key; InputError naming the case if it is none, or does not end as it should."""
    if not isinstance(text, str) or not text.endswith(ending):
        raise InputError(f"case {case_id} in dataset.json: {brief(text)} is no path of a {ending or 'volume'} file")
    return file_within(folder, os.path.expanduser(os.path.expandvars(text)), f"case {case_id} in dataset.json")


def file_within(folder: Path, text: str, where: str) -> Path:
    """The existing file that a dataset.json names by `text`, relative to the dataset's folder or absolute.

    A file from a stranger must not decide what else on this machine is read: paths may not lead out of the folder. A link
    inside it may, because only its owner can have made one.

    Raises:
        InputError: the path leads out of the folder, is not possible on this machine, or there is no such file.
    """
    path = Path(os.path.normpath(folder / text))
    try:
        within = path.is_relative_to(folder) or path.resolve().is_relative_to(folder)
        found = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long for the file system, links in a circle
        within, found = path.is_relative_to(folder), False
    if not within:
        raise InputError(f"{where}: the path {brief(text)} leads out of the dataset's folder; if you trust it, link the "
                         f"folder of the file into the dataset (`ln -s ITS_FOLDER {folder / 'elsewhere'}`) and write elsewhere/{path.name}")
    if not found:
        raise InputError(f"{where}: the file {brief(text)} is missing from {folder}")
    return path


# ------------------------------------------------------------------------------------------------------- read and check


class RawCase(NamedTuple):
    """A case as its files hold it."""

    image: np.ndarray  # float32 (c, d, h, w)
    label: np.ndarray | None  # int16 (1, d, h, w), values 0..K
    spacing: tuple[float, float, float]  # mm, array order
    affine: np.ndarray  # (4, 4), of the first channel


def read_case(case: Case, labels: Labels | None = None) -> RawCase:
    """Read the channels of a case, and its label map if `labels` says what the integers in it mean.

    Raises:
        InputError: unreadable files, files of differing shape, label values that dataset.json does not name.
    """
    volumes = [read_volume(path) for path in case.images]
    first = volumes[0]
    for path, volume in zip(case.images, volumes, strict=True):
        if volume.array.shape != first.array.shape:
            raise _shape_error(case, path, volume.array.shape, first.array.shape)
    image = np.stack([volume.array for volume in volumes]) if len(volumes) > 1 else first.array[None]
    label = None
    if labels is not None and case.label is not None:
        label = _read_label(case, labels)
        if label.shape != first.array.shape:
            raise _shape_error(case, case.label, label.shape, first.array.shape)
        label = label[None]
    return RawCase(image, label, first.spacing, first.affine)


def _read_label(case: Case, labels: Labels) -> np.ndarray:
    try:
        return labels.encode(read_volume(case.label).array)
    except InputError:
        raise
    except ValueError as unknown:
        raise InputError(f"case {case.id}: {case.label} has the values {unknown}, which dataset.json does not name in "
                         '"labels"; correct the label map, or add the labels') from None


def check_dataset(dataset: Dataset, progress: Progress | None = None, workers: int | None = None) -> None:
    """Read every file once and stop at faults that would spoil or crash a training.

    Per case: readable, channels and label on one grid (shape, spacing, affine), finite values, labels in dataset.json;
    and as many cases as numTraining says. Files are read in threads, one case each.

    Raises:
        InputError: the fault of the first faulty case by name, and how many other cases are faulty.
    """
    said = dataset.json.get("numTraining")
    if said != len(dataset.cases):
        alone = _labels_without_image(dataset)
        hint = f" ({', '.join(alone[:5])} {'has a label' if len(alone) == 1 else 'have labels'} but no image)" if alone else ""
        raise InputError(f'{dataset.folder / "dataset.json"}: numTraining is {said!r} but {len(dataset.cases)} cases '
                         f"were found{hint}; correct the number, or complete the dataset")
    faults = [_header_fault(case) for case in dataset.cases]  # cheap, so before all voxels
    if not any(faults):
        faults = map_cases(lambda case: _voxel_fault(case, dataset.labels), dataset.cases, progress, workers)
    faults = [fault for fault in faults if fault]
    if faults:
        raise InputError(faults[0] + (f". {len(faults) - 1} more cases have faults" if len(faults) > 1 else ""))


def _labels_without_image(dataset: Dataset) -> list[str]:
    folder, known = dataset.folder / "labelsTr", {case.id for case in dataset.cases}
    names = [path.name for path in folder.iterdir() if path.name.endswith(dataset.file_ending)] if folder.is_dir() else []
    return sorted({name.removesuffix(dataset.file_ending) for name in names} - known)


def map_cases(function: Callable, cases: tuple[Case, ...], progress: Progress | None, workers: int | None) -> list:
    """[function(case) for case in cases], in threads: reading and NumPy leave Python's lock, nothing needs copying.

    By default as many at once as there are cores, or as fit into the free memory.
    """
    results: list = [None] * len(cases)
    with ThreadPoolExecutor(workers or min(fitting_workers(reading_bytes(case.images) for case in cases), len(cases))) as pool:
        futures = {pool.submit(function, case): index for index, case in enumerate(cases)}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                results[futures[future]] = future.result()
                if progress is not None:
                    progress(done, len(cases))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def default_workers() -> int:
    """Cores that this program may use, at most 16 as memory holds one case per worker."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)


def fitting_workers(bytes_of_cases: Iterable[int]) -> int:
    """Default workers, but no more than fit into the free memory when each holds one of the largest cases; at least one."""
    most = max(bytes_of_cases, default=0)
    return max(1, min(default_workers(), host_bytes_left() // max(1, most)))


def reading_bytes(images: Sequence[Path]) -> int:
    """Bytes that reading and looking at a case takes at most, by the header of its first channel; 0 where that cannot be read.

    All channels twice (as read, and stacked), one file as it is stored, masks and label maps.
    """
    try:
        return math.prod(read_header(images[0]).shape) * (8 * len(images) + 24)
    except InputError:
        return 0


def _header_fault(case: Case) -> str | None:
    try:
        first = read_header(case.images[0])
        for path in (*case.images[1:], *([case.label] if case.label else [])):
            header = read_header(path)
            if header.shape != first.shape:
                raise _shape_error(case, path, header.shape, first.shape)
            cure = "resample to one grid, or copy the header if the voxels agree"
            if not same_spacing(first, header):
                raise InputError(f"case {case.id}: {path} has spacing {header.spacing} mm, its image "
                                 f"{case.images[0].name} has {first.spacing} mm; {cure}")
            off = geometry_difference(first, header)
            if off > GEOMETRY_TOLERANCE * min(first.spacing):
                raise InputError(f"case {case.id}: {path} has another affine (origin or direction) than its image "
                                 f"{case.images[0].name}, up to {off:.3g} mm off; {cure}")
    except InputError as error:
        return f"{error}"
    return None


def _voxel_fault(case: Case, labels: Labels) -> str | None:
    try:
        for path in case.images:
            check_finite(case, path, read_volume(path).array)
        _read_label(case, labels)
    except InputError as error:
        return f"{error}"
    return None


def check_finite(case: Case, path: Path, array: Float[np.ndarray, "d h w"]) -> None:
    """Raise InputError, naming case, file and number, if values of a channel are NaN or infinite."""
    if not (finite := np.isfinite(array)).all():
        raise InputError(f"case {case.id}: {path} holds {array.size - np.count_nonzero(finite)} values that are not finite (NaN or "
                         "infinite); replace them first")


def _shape_error(case: Case, path: Path, shape: tuple, expected: tuple) -> InputError:
    return InputError(f"case {case.id}: {path} has {_sides(shape)} voxels, its image {case.images[0].name} has "
                      f"{_sides(expected)}; all files of a case must lie on one grid")


def _sides(shape: tuple) -> str:
    return " x ".join(str(n) for n in shape)
