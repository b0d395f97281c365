"""The doctor: examines a raw dataset for faults that training would meet later.

Unlike `check_dataset`, which refuses a dataset at its first fault, the doctor reads everything it can, collects what it
finds, and says for each finding which cases, why it matters and what to do. `repair` acts on what is safe to act on.
"""

import hashlib
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from pgps_jax.data.dataset import Labels, explicit_file, fitting_workers, read_dataset_json, reading_bytes, refuse_decathlon
from pgps_jax.data.findings import Finding, Problem, group
from pgps_jax.data.label_pairs import left_right_axis, name_pairs
from pgps_jax.data.nifti import Header, Volume, axis_codes, geometry_difference, read_channels, read_volume, same_spacing
from pgps_jax.errors import InputError, brief

Progress = Callable[[int, int], None]
Say = Callable[[str, str], None]  # (kind of problem, what was seen)


TINY = 4  # voxels; the least that nnU-Net keeps at the bottleneck
RARE = 0.05  # share of the cases
CLEARLY = 2.0  # times better must a label fit the image to be preferred to its mirror image
LEAST_FIT = 0.15  # share of the variance; below it no fit means anything


@dataclass(frozen=True)
class CaseFiles:
    """The files that are there for a case, complete or not."""

    id: str
    images: dict[int, Path] = field(default_factory=dict)  # by channel
    label: Path | None = None


@dataclass(frozen=True)
class CaseFacts:
    """What was read of one case; voxels are not kept."""

    id: str
    files: CaseFiles
    problems: tuple[Problem, ...]
    header: Header | None = None  # of the first channel that can be read
    digest: str | None = None  # of the voxels of all channels
    voxels_of_label: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Examination:
    """All that the doctor knows of a dataset."""

    folder: Path
    json: dict
    channel_names: tuple[str, ...]
    labels: Labels | None  # by the numbers that the files use; None if dataset.json does not say
    cases: tuple[CaseFacts, ...]
    findings: tuple[Finding, ...]  # errors first


def examine(
    folder: Path,
    *,
    tolerance_mm: float = 0.1,
    memory: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Examination:
    """Read every file of a raw dataset once and collect all that may go wrong.

    Args:
        folder: dataset in nnU-Net's raw layout.
        tolerance_mm: by how far the files of a case may place the same voxel apart.
        memory: bytes that a case may need; this machine's memory by default.
        workers: cases read at once.
        progress: called with (cases done, cases in all).

    Raises:
        InputError: there is no dataset.json that can be read, or it is a Decathlon's.
    """
    folder = Path(folder).resolve()
    content = read_dataset_json(folder)
    refuse_decathlon(folder, content)
    channels, labels, problems = _described(content)
    cases, faulty_entries = list_cases(folder, content)
    problems += faulty_entries
    facts = []
    fitting = fitting_workers(reading_bytes(list(case.images.values())) for case in cases if case.images)
    with ThreadPoolExecutor(workers or fitting) as pool:  # reading and NumPy leave Python's lock
        for case in pool.map(lambda case: _examine_case(case, len(channels), labels, tolerance_mm), cases):
            facts.append(case)
            if progress is not None:
                progress(len(facts), len(cases))
    problems += [problem for case in facts for problem in case.problems]
    trained = sum(bool(case.images) for case in cases)
    if content.get("numTraining") != trained:
        said = content.get("numTraining")
        problems.append(Problem("case-count", "", f"numTraining is {said!r}, found {trained} cases"))
    memory = memory or _machine_memory()
    for check in (_classes, _duplicates, _sides, _orientations, _spacings):
        problems += check(facts, labels)
    problems += _huge(facts, labels, len(channels), memory)
    return Examination(folder, content, channels, labels, tuple(facts), group(problems))


def list_cases(folder: Path, content: dict) -> tuple[list[CaseFiles], list[Problem]]:
    """Cases by what lies in imagesTr and labelsTr (or under the key `dataset`), however incomplete; and entries that name no file."""
    if isinstance(content.get("dataset"), dict):
        return _explicit_cases(folder, content["dataset"])
    ending = _ending(content)
    images: dict[str, dict[int, Path]] = defaultdict(dict)
    labels: dict[str, Path] = {}
    for path in sorted((folder / "imagesTr").glob("*")):
        match = re.fullmatch(r"([^.].*)_(\d{4})", path.name.removesuffix(ending))
        if match and path.name.endswith(ending):
            images[match[1]][int(match[2])] = path
    for path in sorted((folder / "labelsTr").glob("*")):
        if path.name.endswith(ending) and not path.name.startswith("."):
            labels[path.name.removesuffix(ending)] = path
    return [CaseFiles(case, images.get(case, {}), labels.get(case)) for case in sorted({*images, *labels})], []


def _explicit_cases(folder: Path, entries: dict) -> tuple[list[CaseFiles], list[Problem]]:
    cases, problems = [], []

    def located(case: str, value: object) -> Path | None:
        try:
            return explicit_file(folder, case, value)
        except InputError as error:
            problems.append(Problem("dataset-json", case, str(error)))
            return None

    for case, entry in sorted(entries.items()):
        if not isinstance(entry, dict) or not isinstance(entry.get("images"), list):
            problems.append(Problem("dataset-json", case, f'want {{"images": [path per channel], "label": path}}, found {brief(entry)}'))
            continue
        files = {number: located(case, value) for number, value in enumerate(entry["images"])}
        label = located(case, entry["label"]) if "label" in entry else None
        images = {number: path for number, path in files.items() if path is not None}
        if images or label is not None:
            cases.append(CaseFiles(case, images, label))
    return cases, problems


def _ending(content: dict) -> str:
    ending = content.get("file_ending")
    return ending if isinstance(ending, str) else ".nii.gz"


def _described(content: dict) -> tuple[tuple[str, ...], Labels | None, list[Problem]]:
    """Channel names and labels as far as dataset.json tells them."""
    problems = []
    names = content.get("channel_names", content.get("modality"))
    if not isinstance(names, dict) or not names:
        problems.append(Problem("dataset-json", "", f"channel_names is {names!r}, want {{\"0\": \"CT\", ...}}"))
        names = {"0": "channel 0"}
    if not isinstance(content.get("file_ending"), str):
        problems.append(Problem("dataset-json", "", f"file_ending is {brief(content.get('file_ending'))}; assumed .nii.gz"))
    if not isinstance(content.get("dataset", {}), dict):
        problems.append(Problem("dataset-json", "", f"dataset is {brief(content['dataset'])}, want an object of cases"))
    try:
        labels = Labels.from_json(content).in_files
    except InputError as error:
        problems.append(Problem("dataset-json", "", str(error).removeprefix("dataset.json: ")))
        labels = None
    return tuple(str(name) for name in names.values()), labels, problems


# ------------------------------------------------------------------------------------------------------------ one case


def _examine_case(case: CaseFiles, num_channels: int, labels: Labels | None, tolerance_mm: float) -> CaseFacts:
    problems: list[Problem] = []

    def say(kind: str, detail: str) -> None:
        problems.append(Problem(kind, case.id, detail))

    for number in range(num_channels):
        if number not in case.images and case.images:
            say("missing-channel", f"channel {number}")
    for number in sorted(set(case.images) - set(range(num_channels))):
        say("surplus-channel", case.images[number].name)
    if case.label is None:
        say("missing-label", f"labelsTr/{case.id} is missing")
    if not case.images:
        say("label-without-image", case.label.name)
        return CaseFacts(case.id, case, tuple(problems))

    first: Volume | None = None
    digest = hashlib.sha256()
    for path in case.images.values():
        volume = _read(path, say)
        if volume is None:
            continue
        digest.update(str(volume.array.shape).encode())
        digest.update(volume.array)
        _check_image(path, volume, say)
        if first is not None:
            _check_geometry(path, header_of(volume), header_of(first), tolerance_mm, say)
        elif min(volume.array.shape) < TINY:
            say("tiny-image", f"{path.name}: {_voxels(volume.array.shape)}")
        first = first or volume
    label = None if case.label is None else _read(case.label, say)
    counts: dict[int, int] = {}
    if label is not None:
        counts = _check_label(case.label, label.array, labels, say)
        if first is not None:
            said = len(problems)
            _check_geometry(case.label, header_of(label), header_of(first), tolerance_mm, say)
            if len(problems) == said and (axis := fits_better_mirrored(first.array, label.array > 0)) is not None:
                say("label-looks-flipped", f"{case.label.name}: array axis {axis}")
    return CaseFacts(case.id, case, tuple(problems), None if first is None else header_of(first),
                     digest.hexdigest() if first is not None else None, counts)


def header_of(volume: Volume) -> Header:
    """A volume's geometry."""
    return Header(volume.array.shape, volume.spacing, volume.affine)


def _read(path: Path, say: Say) -> Volume | None:
    try:
        return read_volume(path)
    except InputError as error:
        try:
            entries = len(read_channels(path)[0])
        except InputError:
            entries = 1
        if entries > 1:
            say("four-dimensional", f"{path.name}: {entries} volumes in one file")
        else:
            say("unreadable", str(error))
        return None


def _check_image(path: Path, volume: Volume, say: Say) -> None:
    array = volume.array
    finite = np.isfinite(array)
    if not finite.all():
        say("not-finite", f"{path.name}: {np.count_nonzero(~finite)} of {array.size} voxels")
    elif array.min() == array.max():
        say("constant-image", f"{path.name}: {array.min():g} everywhere")


def _check_label(path: Path, array: np.ndarray, labels: Labels | None, say: Say) -> dict[int, int]:
    """Voxels of each label value, integers only."""
    values, counts = np.unique(array, return_counts=True)
    if not np.isfinite(values).all():
        say("not-finite", f"{path.name}: {counts[~np.isfinite(values)].sum()} of {array.size} voxels")
    whole = np.isfinite(values) & (values == np.round(values))
    fractions = values[np.isfinite(values) & ~whole]
    if len(fractions):
        say("fractional-label", f"{path.name}: {', '.join(f'{v:g}' for v in fractions[:5])}"
            + (f" and {len(fractions) - 5} more" if len(fractions) > 5 else ""))
    found = {int(value): int(count) for value, count in zip(values[whole], counts[whole], strict=True)}
    if labels is not None:
        known = {*labels.all_labels, *(() if labels.ignore is None else (labels.ignore,))}
        unknown = sorted(set(found) - known)
        if unknown:
            say("unexpected-label", f"{path.name}: " + ", ".join(f"{v} ({found[v]} voxels)" for v in unknown[:8]))
    if set(found) <= {0} and not len(fractions):
        say("empty-label", path.name)
    return found


def _check_geometry(path: Path, header: Header, first: Header, tolerance_mm: float, say: Say) -> None:
    off = geometry_difference(first, header)
    if flips := flipped_axes(first, header):
        say("flipped-axis", f"{path.name}: array axis {', '.join(map(str, flips))}")
    elif header.shape != first.shape:
        say("shape-mismatch", f"{path.name}: {_voxels(header.shape)}, the image has {_voxels(first.shape)}")
    elif off > tolerance_mm:
        say("geometry-mismatch", f"{path.name}: up to {off:.3g} mm apart")
    elif not same_spacing(first, header):
        say("geometry-mismatch", f"{path.name}: spacing {_mm(header.spacing)}, the image has {_mm(first.spacing)}")


def flipped_axes(first: Header, second: Header) -> tuple[int, ...]:
    """Array axes along which the second header runs against the first, if their directions differ in nothing else."""
    turn = np.linalg.inv(first.affine[:3, :3]) @ second.affine[:3, :3]
    if first.shape != second.shape or not np.allclose(np.abs(turn), np.eye(3), atol=0.02):
        return ()
    return tuple(2 - axis for axis in (2, 1, 0) if turn[axis, axis] < 0)


def fit(image: Float[np.ndarray, "d h w"], mask: Bool[np.ndarray, "d h w"]) -> float:
    """How well a mask separates intensities: share of the variance in it and around it (3 voxels) that it explains."""
    around = ndimage.binary_dilation(mask, iterations=3) & ~mask
    inside, outside = image[mask].astype(np.float64), image[around].astype(np.float64)
    both = np.concatenate([inside, outside])
    if not len(inside) or not len(outside) or both.var() == 0:
        return 0.0
    return float(1 - (inside.var() * len(inside) + outside.var() * len(outside)) / (both.var() * len(both)))


def fits_better_mirrored(image: Float[np.ndarray, "d h w"], mask: Bool[np.ndarray, "d h w"]) -> int | None:
    """The array axis along which the mirrored mask fits the image clearly better than the mask as it is, or None."""
    if not mask.any() or not np.isfinite(image).all():
        return None
    fits = {axis: fit(image, np.flip(mask, axis)) for axis in range(3)}
    best = max(fits, key=fits.get)
    return best if fits[best] > max(CLEARLY * fit(image, mask), LEAST_FIT) else None


# ----------------------------------------------------------------------------------------------------------- all cases


def _classes(facts: list[CaseFacts], labels: Labels | None) -> Iterator[Problem]:
    if labels is None:
        return
    labelled = [case for case in facts if case.voxels_of_label]
    for name, value in zip(labels.names, labels.values, strict=True):
        if value == 0 or not labelled:
            continue
        members = value if isinstance(value, tuple) else (value,)
        present = sum(any(case.voxels_of_label.get(v) for v in members) for case in labelled)
        if not present:
            yield Problem("class-without-voxels", "", f"{name} (label {value})")
        elif present < max(RARE * len(labelled), 2):
            yield Problem("rare-class", "", f"{name} (label {value}): {present} of {len(labelled)} cases")


def _duplicates(facts: list[CaseFacts], labels: Labels | None) -> Iterator[Problem]:
    same = defaultdict(list)
    for case in facts:
        if case.digest is not None and not any(p.kind == "constant-image" for p in case.problems):
            same[case.digest].append(case.id)
    for cases in same.values():
        for case in cases[1:]:
            yield Problem("duplicate-images", case, f"same voxels as {cases[0]}")


def _sides(facts: list[CaseFacts], labels: Labels | None) -> Iterator[Problem]:
    header = next((case.header for case in facts if case.header is not None), None)
    for left, right in name_pairs(labels.names) if labels is not None else ():
        axis = "" if header is None else f": array axis {left_right_axis(header.affine)}"
        yield Problem("left-right-labels", "", f"{left} and {right}{axis}")


def _orientations(facts: list[CaseFacts], labels: Labels | None) -> Iterator[Problem]:
    codes = {case.id: axis_codes(case.header.affine) for case in facts if case.header is not None}
    if len(set(codes.values())) > 1:
        usual, number = Counter(codes.values()).most_common(1)[0]
        for case, code in codes.items():
            if code != usual:
                yield Problem("orientation-mixture", case, f"{code}, while {number} cases are {usual}")


def _spacings(facts: list[CaseFacts], labels: Labels | None) -> Iterator[Problem]:
    known = {case.id: np.asarray(case.header.spacing) for case in facts if case.header is not None}
    if not known:
        return
    usual = np.median(list(known.values()), axis=0)
    for case, spacing in known.items():
        if (np.maximum(spacing / usual, usual / spacing) > 3).any():
            yield Problem("odd-spacing", case, f"{_mm(spacing)}, the median is {_mm(usual)}")


def _huge(facts: list[CaseFacts], labels: Labels | None, num_channels: int, memory: int) -> Iterator[Problem]:
    known = [case for case in facts if case.header is not None]
    usual = np.median([case.header.spacing for case in known], axis=0) if known else None
    for case in known:
        needed = forecast(case.header, usual, num_channels, 2 if labels is None else labels.num_outputs)
        if needed > memory:
            yield Problem("huge-case", case.id, f"{_voxels(case.header.shape)} need about "
                          f"{needed / 1e9:.3g} GB, this machine has {memory / 1e9:.3g} GB")


def forecast(header: Header, target: Float[np.ndarray, " 3"], num_channels: int, num_outputs: int) -> int:
    """Bytes that preprocessing or predicting a case takes at most: original and resampled arrays in float32."""
    voxels = math.prod(header.shape)
    resampled = float(np.prod(np.round(np.asarray(header.shape) * header.spacing / target)))
    preprocessing = voxels * (8 * num_channels + 4) + resampled * (4 * num_channels + 4)
    prediction = resampled * 4 * (num_channels + num_outputs + 1) + voxels * 10
    return int(max(preprocessing, prediction))


def _machine_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # Windows
        return 2**62


def _voxels(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) + " voxels"


def _mm(spacing: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{s:.3g}" for s in spacing) + " mm"
