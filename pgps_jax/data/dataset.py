"""A dataset of labelled images in nnU-Net's raw layout: its cases, channels and labels, and the checks before work.

    DATASET/dataset.json   channel_names, labels, numTraining, file_ending, ...
    DATASET/imagesTr/CASE_0000.nii.gz, CASE_0001.nii.gz, ...   one file per channel
    DATASET/labelsTr/CASE.nii.gz
"""

import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer, Num

from pgps_jax.data.nifti import NIFTI_ENDINGS, SITK_ENDINGS, geometry_difference, read_header, read_volume
from pgps_jax.errors import InputError

Label = int | tuple[int, ...]  # a tuple is a region: the union of several labels
Progress = Callable[[int, int], None]  # (done, total)

GEOMETRY_TOLERANCE = 0.5  # voxels by which the label may lie off its image


# ------------------------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Labels:
    """What the voxels of a label map stand for.

    Inside, labels are always 0, 1, ..., K without gaps, the ignore label last. Files may use any integers: `raw_values`
    holds what label i is called in the files, and is empty where both agree. `encode` and `decode` translate.
    """

    names: tuple[str, ...]
    values: tuple[Label, ...]  # in the order of dataset.json, including background, without the ignore label
    ignore: int | None = None
    regions_class_order: tuple[int, ...] | None = None
    raw_values: tuple[int, ...] = ()

    @property
    def has_regions(self) -> bool:
        """Overlapping regions, each with an output of its own, instead of exclusive labels."""
        return any(isinstance(value, tuple) for value in self.values)

    @property
    def foreground(self) -> tuple[Label, ...]:
        """Labels or regions other than background, in the order of dataset.json."""
        return tuple(value for value in self.values if value != 0)

    @property
    def all_labels(self) -> tuple[int, ...]:
        """Every integer that is annotated, sorted, with 0 and without the ignore label."""
        members = (value if isinstance(value, tuple) else (value,) for value in self.values)
        return tuple(sorted({label for region in members for label in region}))

    @property
    def num_outputs(self) -> int:
        """Output channels of a network: one per label with background, or one per foreground region."""
        return len(self.foreground) if self.has_regions else len(self.all_labels)

    @property
    def in_files(self) -> "Labels":
        """The same labels by the integers that the dataset's files use: for reading and comparing files as they are."""
        if not self.raw_values:
            return self

        def raw(value: Label) -> Label:
            return tuple(raw(v) for v in value) if isinstance(value, tuple) else self.raw_values[value]

        order = None if self.regions_class_order is None else raw(self.regions_class_order)
        ignore = None if self.ignore is None else raw(self.ignore)
        return Labels(self.names, tuple(raw(v) for v in self.values), ignore, order)

    def encode(self, array: Num[np.ndarray, "*shape"]) -> Integer[np.ndarray, "*shape"]:
        """Label map of a file -> int16 labels 0..K. Raises ValueError listing the values that are no labels."""
        known = np.asarray(self.raw_values or self.all_labels + (() if self.ignore is None else (self.ignore,)))
        below, above = known.min() - 1, known.max() + 1  # stand for everything outside the known range
        table = np.full(above - below + 1, -1, np.int16)
        table[known - below] = np.arange(len(known))
        whole = np.rint(np.clip(np.nan_to_num(array, nan=below), below, above)).astype(np.int64)
        encoded = table[whole - below]
        unknown = (encoded < 0) | (np.abs(whole - array) > 1e-4)  # scaled headers give 0.9999999 for 1
        if unknown.any():
            found = np.unique(array[unknown])
            raise ValueError(", ".join(f"{value:g}" for value in found[:10]) + (", ..." if len(found) > 10 else ""))
        return encoded

    def decode(self, array: Integer[np.ndarray, "*shape"]) -> Integer[np.ndarray, "*shape"]:
        """Labels 0..K -> the integers that the dataset's files use."""
        return np.asarray(self.raw_values)[array] if self.raw_values else array

    @staticmethod
    def from_json(dataset_json: dict) -> "Labels":
        """Labels of a dataset.json.

        Raises:
            InputError: background is not 0, a label is neither an integer nor a list of integers, the ignore label is a
                region or used otherwise, regions without a fitting `regions_class_order`.
        """
        entries = dataset_json.get("labels")
        if not isinstance(entries, dict) or not entries:
            raise InputError('dataset.json: "labels" must be an object {name: integer}, with "background": 0')
        if all(str(name).lstrip("-").isdigit() and isinstance(value, str) for name, value in entries.items()):
            raise InputError('dataset.json: "labels" is written {"1": "liver"}; nnU-Net wants {"liver": 1}. '
                             "Is this a Medical Segmentation Decathlon folder? Convert it with `convert-msd`")
        values = {name: _label_value(name, value) for name, value in entries.items()}
        if values.get("background") != 0:
            raise InputError('dataset.json: "labels" must contain "background": 0')
        ignore = values.pop("ignore", None)
        if isinstance(ignore, tuple):
            raise InputError('dataset.json: the label "ignore" must be one integer, not a region')
        labels = Labels(tuple(values), tuple(values.values()), ignore, None)
        if ignore in labels.all_labels:
            raise InputError(f'dataset.json: the value {ignore} of "ignore" is used by another label too')
        if len(set(labels.values)) != len(labels.values):
            raise InputError('dataset.json: two names in "labels" have the same value; every label needs its own')
        return _without_gaps(_with_class_order(labels, dataset_json.get("regions_class_order")))


def _label_value(name: str, value: object) -> Label:
    members = value if isinstance(value, list) else [value]
    if not members or not all(isinstance(v, int) and not isinstance(v, bool) and abs(v) < 2**24 for v in members):
        raise InputError(f'dataset.json: label "{name}" is {value!r}; want an integer, or a list of them for a region')
    return tuple(members) if len(members) > 1 else members[0]


def _with_class_order(labels: Labels, order: object) -> Labels:
    if not labels.has_regions:
        return labels
    wanted = len(labels.foreground)
    if not isinstance(order, list) or len(order) != wanted or not set(order) <= set(labels.all_labels):
        raise InputError(f'dataset.json: with regions, "regions_class_order" must list the label to write for each of '
                         f"the {wanted} foreground regions, in their order; found {order!r}")
    return Labels(labels.names, labels.values, labels.ignore, tuple(order))


def _without_gaps(labels: Labels) -> Labels:
    """Number the labels 0..K, the ignore label last, and remember what the files call them."""
    raw = labels.all_labels if 0 in labels.all_labels[:1] else (0, *(v for v in labels.all_labels if v != 0))
    raw += () if labels.ignore is None else (labels.ignore,)
    if raw == tuple(range(len(raw))):
        return labels

    def inner(value: Label) -> Label:
        return tuple(inner(v) for v in value) if isinstance(value, tuple) else raw.index(value)

    order = None if labels.regions_class_order is None else inner(labels.regions_class_order)
    ignore = None if labels.ignore is None else len(raw) - 1
    return Labels(labels.names, tuple(inner(v) for v in labels.values), ignore, order, raw)


# ------------------------------------------------------------------------------------------------------------ dataset


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
    if "training" in content and "file_ending" not in content:
        raise InputError(f"{folder} is a Medical Segmentation Decathlon folder; convert it to nnU-Net's layout first: "
                         f"`convert-msd {folder}`")
    for key in ("labels", "numTraining", "file_ending"):
        if key not in content:
            raise InputError(f'{folder / "dataset.json"}: the key "{key}" is missing')
    ending = content["file_ending"]
    if ending not in NIFTI_ENDINGS + SITK_ENDINGS:
        raise InputError(f'{folder / "dataset.json"}: file_ending {ending!r} is not read; known are '
                         f"{', '.join(NIFTI_ENDINGS + SITK_ENDINGS)}")
    channels = _channel_names(folder, content)
    try:
        labels = Labels.from_json(content)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    find = _explicit_cases if "dataset" in content else _scanned_cases
    cases = find(folder, content, channels)
    if not cases:
        raise InputError(f"{folder}: no training cases found; images are expected as imagesTr/CASE_0000{ending}")
    return Dataset(folder, folder.name, channels, labels, ending, cases, content)


def read_dataset_json(folder: Path) -> dict:
    """dataset.json of a folder as it is; InputError if there is none or it is not a JSON object."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a dataset is a folder with dataset.json, imagesTr and labelsTr")
    path = folder / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: this file is missing; it names the channels and labels of the dataset") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def _channel_names(folder: Path, content: dict) -> tuple[str, ...]:
    names = content.get("channel_names", content.get("modality"))  # `modality` is what nnU-Net 1 called it
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))} or not names:
        raise InputError(f'{folder / "dataset.json"}: "channel_names" must be an object {{"0": "CT", "1": ...}} '
                         f"numbered from 0 without gaps; found {names!r}")
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
    """Cases of the `dataset` key; paths relative to the folder, $VARIABLES and ~ expanded, anywhere on this machine."""
    entries = content["dataset"]
    if not isinstance(entries, dict):
        raise InputError(f'{folder / "dataset.json"}: "dataset" must be {{case: {{"images": [...], "label": ...}}}}')

    def located(case_id: str, text: object) -> Path:
        if not isinstance(text, str) or not text.endswith(content["file_ending"]):
            raise InputError(f"case {case_id} in dataset.json: {text!r} is no path of a {content['file_ending']} file")
        path = Path(os.path.normpath(folder / os.path.expanduser(os.path.expandvars(text))))
        if not path.is_file():
            raise InputError(f"case {case_id} in dataset.json: the file {path} is missing")
        return path

    cases = []
    for case_id, entry in sorted(entries.items()):
        if not re.fullmatch(r"[^/\\\0.][^/\\\0]*", case_id):
            raise InputError(f"{folder / 'dataset.json'}: the case name {case_id!r} cannot be a file name")
        if not isinstance(entry, dict) or not isinstance(entry.get("images"), list) or "label" not in entry:
            raise InputError(f'case {case_id} in dataset.json: want {{"images": [path per channel], "label": path}}')
        if len(entry["images"]) != len(channels):
            raise InputError(f"case {case_id} in dataset.json: {len(entry['images'])} images for the {len(channels)} "
                             f"channels {', '.join(channels)}")
        images = tuple(located(case_id, image) for image in entry["images"])
        cases.append(Case(case_id, images, located(case_id, entry["label"])))
    return tuple(cases)


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
    """[function(case) for case in cases], in threads: reading and NumPy leave Python's lock, nothing needs copying."""
    results: list = [None] * len(cases)
    with ThreadPoolExecutor(workers or min(default_workers(), len(cases))) as pool:
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


def _header_fault(case: Case) -> str | None:
    try:
        first = read_header(case.images[0])
        for path in (*case.images[1:], *([case.label] if case.label else [])):
            header = read_header(path)
            if header.shape != first.shape:
                raise _shape_error(case, path, header.shape, first.shape)
            cure = "resample to one grid, or copy the header if the voxels agree"
            if not np.allclose(header.spacing, first.spacing, rtol=1e-3):
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
            array = read_volume(path).array
            if not np.isfinite(array).all():
                bad = int((~np.isfinite(array)).sum())
                raise InputError(f"case {case.id}: {path} holds {bad} values that are not finite (NaN or infinite); "
                                 "replace them first")
        _read_label(case, labels)
    except InputError as error:
        return f"{error}"
    return None


def _shape_error(case: Case, path: Path, shape: tuple, expected: tuple) -> InputError:
    return InputError(f"case {case.id}: {path} has {_sides(shape)} voxels, its image {case.images[0].name} has "
                      f"{_sides(expected)}; all files of a case must lie on one grid")


def _sides(shape: tuple) -> str:
    return " x ".join(str(n) for n in shape)
