"""Segment volumes and folders of images with a trained network."""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Integer, PyTree, Shaped

from pgps_jax.data.dataset import GEOMETRY_TOLERANCE, Case, Labels, RawCase, check_case_id, read_case
from pgps_jax.data.label_pairs import swapped_outputs
from pgps_jax.data.nifti import Volume, axis_codes, geometry_difference, read_header, reordered, reorient, write_volume
from pgps_jax.data.plan import Configuration, Plan, check_preprocessing
from pgps_jax.data.preprocess import preprocess_case
from pgps_jax.data.store import Preprocessed
from pgps_jax.errors import InputError, brief
from pgps_jax.infer.export import restore_labels, restore_probabilities
from pgps_jax.infer.sliding_window import NetworkFunction, SlidingWindow
from pgps_jax.interop.preprocessed import write_properties
from pgps_jax.json_file import read_json, write_json
from pgps_jax.models import build
from pgps_jax.models.conv import compiler_options

OUTSIDE_LOGIT = 20.0  # of background in tiles that are skipped; certain, but a finite number
MADE_BY = "predict.json"  # beside segmentations: what they depend on but the images
MOST_NAMED = 10  # faulty cases that a message lists


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained network (one or several folds) with all that its images and its labels need. Stays compiled."""

    plan: Plan
    configuration: Configuration
    labels: Labels
    channel_names: tuple[str, ...]
    fold_params: tuple[PyTree, ...]  # on the device
    window: SlidingWindow
    file_ending: str = ".nii.gz"
    orientation: str | None = None  # of the training images, such as "RAS"; None: take images as they are, as nnU-Net

    def predict_case(self, volumes: Sequence[Volume]) -> Integer[np.ndarray, "d h w"]:
        """Label map of one case, in the frame of its images.

        Args:
            volumes: one per channel, in the order of `channel_names`; equal shapes.
        """
        if len(volumes) != len(self.channel_names):
            raise InputError(f"{len(volumes)} images given, the network takes {len(self.channel_names)} channels: "
                             f"{', '.join(self.channel_names)}")
        if len({v.array.shape for v in volumes}) != 1:
            raise InputError(f"channels differ in shape: {', '.join(str(v.array.shape) for v in volumes)}")
        image = np.stack([np.asarray(v.array, np.float32) for v in volumes])
        case = self.preprocess(RawCase(image, None, volumes[0].spacing, volumes[0].affine))
        return self.restore(self.logits(case), case)

    def preprocess(self, raw: RawCase) -> Preprocessed:
        """Exactly as before training; volumes of another orientation than the training's are brought to that first."""
        if not np.isfinite(raw.image).all():
            raise InputError("the image holds values that are not finite (NaN or infinite); replace them first")
        if self.orientation is None or axis_codes(raw.affine) == self.orientation:
            return preprocess_case(raw, self.plan, self.configuration, self.labels)
        turned = [reorient(channel, raw.affine, self.orientation) for channel in raw.image]
        affine = turned[0][1]
        spacing = reordered(raw.spacing, raw.affine, self.orientation)  # the header's, which the affine need not agree with
        image = np.stack([channel for channel, _ in turned])
        case = preprocess_case(RawCase(image, None, spacing, affine), self.plan, self.configuration, self.labels)
        case.properties["nibabel_stuff"] = {"original_affine": raw.affine.tolist(), "reoriented_affine": affine.tolist()}
        return case

    def logits(
        self, case: Preprocessed, progress: Callable[[int, int], None] | None = None
    ) -> Float[np.ndarray, "k d h w"]:
        """Mean logits of the folds on the preprocessed grid."""
        logits = self.window(self.fold_params, case.image, progress)
        if not all(np.isfinite(channel).all() for channel in logits):
            raise FloatingPointError("the network returned values that are not finite; its weights may be damaged")
        return logits

    def restore(self, logits: Float[np.ndarray, "k d h w"], case: Preprocessed) -> Integer[np.ndarray, "x y z"]:
        """Label map in the frame of the images."""
        return in_file_frame(
            restore_labels(logits, case.properties, self.plan, self.configuration, self.labels), case.properties)

    def probabilities(
        self, logits: Float[np.ndarray, "k d h w"], case: Preprocessed
    ) -> Float[np.ndarray, "k x y z"]:
        """Class probabilities in the frame of the images; all classes at full resolution."""
        found = restore_probabilities(logits, case.properties, self.plan, self.configuration, self.labels)
        if "reoriented_affine" not in case.properties["nibabel_stuff"]:
            return found
        return np.stack([in_file_frame(k, case.properties) for k in found])


def in_file_frame(array: Shaped[np.ndarray, "d h w"], properties: dict) -> Shaped[np.ndarray, "x y z"]:
    """A volume of a case as its image file holds it: turned back where the image was turned, and both its affines are known.

    Images are turned before prediction here, and before training by nnU-Net's reorienting reader.
    """
    stuff = {name: np.asarray(affine, np.float64) for name, affine in properties["nibabel_stuff"].items()}
    if "reoriented_affine" not in stuff:
        return array
    return reorient(array, stuff["reoriented_affine"], axis_codes(stuff["original_affine"]))[0]


def make_predictor(
    plan: Plan,
    configuration: Configuration,
    labels: Labels,
    channel_names: Sequence[str],
    fold_params: Sequence[PyTree],
    *,
    file_ending: str = ".nii.gz",
    orientation: str | None = None,
    mirror: bool = True,
    mirror_axes: Sequence[int] | None = None,
    swap_axis: int | None = None,
    swap_pairs: Sequence[tuple[int, int]] = (),
    step: float = 0.5,
    tile_batch: int | None = None,
    skip_outside: bool = False,
    dtype: jnp.dtype | None = None,
) -> Predictor:
    """Put a predictor together; the network is built from the configuration's architecture.

    Args:
        fold_params: parameters of each fold as nested dicts (`nnx.to_pure_dict`); logits of the folds are averaged.
        orientation: of the training images, such as "RAS": other images are brought to it and their labels back. None
            takes images as they are, as nnU-Net does.
        mirror: average over mirrored copies of each tile.
        mirror_axes: axes to mirror; by default all along which the patch has more than one voxel.
        swap_axis, swap_pairs: the axis from left to right and the pairs of labels whose logits are exchanged in copies
            mirrored along it, for networks that were trained so (augment.mirror label-swap).
        step: distance of neighbouring tiles in patch lengths.
        skip_outside: leave out tiles in which all channels are constant; what no other tile covers is background.
        dtype: of the computation; by default bfloat16 on accelerators and float32 on CPU.

    Raises:
        InputError: the plan asks for preprocessing that is not done here, or for a network that is not built here.
    """
    if not fold_params:
        raise ValueError("make_predictor: no parameters given")
    check_preprocessing(configuration)
    if mirror_axes is None:
        mirror_axes = [axis for axis in range(3) if configuration.patch_size[axis] > 1]
    window = SlidingWindow(
        network_function(configuration, len(channel_names), labels.num_outputs, dtype),
        configuration.patch_size,
        labels.num_outputs,
        mirror_axes if mirror else (),
        swap=(swap_axis, swapped_outputs(labels, swap_pairs)) if swap_axis is not None else None,
        step=step,
        tile_batch=tile_batch,
        outside=background_logits(labels) if skip_outside else None,
        compiler_options=compiler_options(jax.default_backend()) or None,
    )
    params = tuple(jax.device_put(params) for params in fold_params)
    return Predictor(plan, configuration, labels, tuple(channel_names), params, window, file_ending,
                     orientation)


def network_function(
    configuration: Configuration, in_channels: int, out_channels: int, dtype: jnp.dtype | None = None
) -> NetworkFunction:
    """The planned network as a function (params, x) -> full-resolution logits."""
    dtype = dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    abstract = nnx.eval_shape(
        lambda: build(configuration.architecture, in_channels, out_channels, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, _ = nnx.split(abstract, nnx.Param)
    return lambda params, x: nnx.merge(graphdef, params)(x, deep_supervision=False)[0]


def background_logits(labels: Labels) -> tuple[float, ...]:
    """Logits that mean background and nothing else."""
    if labels.has_regions:
        return (-OUTSIDE_LOGIT,) * labels.num_outputs
    return (OUTSIDE_LOGIT,) + (0.0,) * (labels.num_outputs - 1)


class Segmented(NamedTuple):
    """What became of the cases of a folder."""

    written: tuple[Path, ...]  # segmentations that were made
    kept: int  # cases whose files were there already


def predict_folder(
    predictor: Predictor,
    images: Path,
    output: Path,
    *,
    save_probabilities: bool = False,
    overwrite: bool = False,
    made_by: dict | None = None,
    progress: Callable[[int, int], None] | None = None,
    tile_progress: Callable[[int, int, str], None] | None = None,
) -> Segmented:
    """Segment every case of a folder of images in nnU-Net's naming (CASE_0000.nii.gz, CASE_0001.nii.gz, ...).

    Names, channels and headers of all cases are checked before the first is predicted. Each segmentation is written
    atomically as CASE.nii.gz with the affine of its first channel. Reading the next case and writing the last one overlap
    with prediction, so that at most three cases are in memory.

    Args:
        save_probabilities: also write CASE.npz, key `probabilities`, (k, d, h, w) in the image's frame, and CASE.pkl,
            with which nnU-Net can average them with its own.
        overwrite: predict cases again whose files exist; they are kept otherwise.
        made_by: what segmentations depend on beside the images (JSON values); written to predict.json.
        progress: called with (cases done, cases to do).
        tile_progress: called with (cases done, cases to do, how far the next one is, in words).

    Raises:
        InputError: missing or surplus channels, channels that differ in geometry, an output folder that holds
            segmentations made otherwise or cannot be written; and after all others are done, cases whose voxels cannot
            be read or used.
    """
    cases = find_cases(images, predictor.channel_names, predictor.file_ending)
    for case in cases:
        check_geometry(case)
    wanted = slice(None) if save_probabilities else slice(1)
    endings = (predictor.file_ending, ".npz", ".pkl")
    _open_output(output, made_by, overwrite, [output / f"{case.id}{ending}" for case in cases for ending in endings])
    files = {case.id: [output / f"{case.id}{ending}" for ending in endings[wanted]] for case in cases}
    todo = [case for case in cases if overwrite or not all(file.exists() for file in files[case.id])]
    failures: list[str] = []
    done = -1

    def count(writing: Future | None = None) -> None:
        nonlocal done
        if writing is not None:
            writing.result()  # bounds what waits, and raises what failed
        done += 1
        if progress is not None:
            progress(done, len(todo))

    def count_tiles(tiles: int, of: int) -> None:
        tile_progress(done, len(todo), f"tile {tiles} of {of}")

    count()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        upcoming, writing = None, None
        for case, after in pairwise([*todo, None]):
            reading = upcoming or reader.submit(_read, predictor, case)
            wait([reading])
            upcoming = reader.submit(_read, predictor, after) if after else None
            try:
                prepared = reading.result()
                logits = predictor.logits(prepared, count_tiles if tile_progress else None)
            except (InputError, FloatingPointError) as error:
                failures.append(f"case {case.id}: {error}")
                count()
                continue
            if writing is not None:
                count(writing)
            writing = writer.submit(_write, predictor, files[case.id], prepared, logits)
        if writing is not None:
            count(writing)
    if failures:
        raise InputError(f"{len(failures)} of {len(todo)} cases could not be segmented; the others are in {output}. "
                         + " ".join(failures[:MOST_NAMED]) + (" ..." if len(failures) > MOST_NAMED else ""))
    return Segmented(tuple(files[case.id][0] for case in todo), len(cases) - len(todo))


def _open_output(output: Path, made_by: dict | None, overwrite: bool, files: list[Path]) -> None:
    """Make the output folder and say in it what its segmentations are made by.

    With `overwrite`, files that were made otherwise are deleted first: whatever stops the prediction, two kinds never mix.
    """
    known = output / MADE_BY
    was = read_json(known) if made_by is not None and known.exists() else None
    if was is not None and was != made_by and not overwrite:
        other = [f"{key} ({brief(was.get(key))} there, {brief(value)} now)" for key, value in made_by.items() if was.get(key) != value]
        raise InputError(f"{known}: the segmentations there were made otherwise: {'; '.join(other) or 'by more'}. Name another output "
                         "folder, or make them again with --overwrite")
    try:
        output.mkdir(parents=True, exist_ok=True)
        if made_by is not None and was != made_by:
            for file in files if overwrite else ():
                file.unlink(missing_ok=True)
            write_json(known, made_by)
    except OSError as error:
        raise InputError(f"{output}: cannot be made the output folder ({error.strerror})") from None


def _read(predictor: Predictor, case: Case) -> Preprocessed:
    return predictor.preprocess(read_case(case))


def _write(predictor: Predictor, files: Sequence[Path], case: Preprocessed, logits: np.ndarray) -> None:
    """Write probabilities and properties, if they have names, and last the segmentation, which says that a case is done."""
    segmentation, *more = files
    try:
        if more:
            _write_probabilities(more[0], predictor.probabilities(logits, case))
            write_properties(more[1], case)
        affine = np.asarray(case.properties["nibabel_stuff"]["original_affine"])
        write_volume(segmentation, predictor.restore(logits, case), affine)
    except OSError as error:
        raise InputError(f"{segmentation}: cannot be written ({error.strerror or error}); the cases written before are complete, and the "
                         "same command goes on behind them") from None


def find_cases(images: Path, channel_names: Sequence[str], file_ending: str) -> tuple[Case, ...]:
    """Cases of a folder by nnU-Net's naming; InputError if a case lacks a channel or has one too many."""
    if not images.is_dir():
        raise InputError(f"{images}: no such folder of images")
    channels: dict[str, dict[int, Path]] = {}
    others = []
    for path in sorted(images.iterdir()):
        if path.name.startswith(".") or not path.name.endswith(file_ending):
            continue
        match = re.fullmatch(r"(.+)_(\d{4})", path.name.removesuffix(file_ending))
        if match:
            check_case_id(match[1], images)
            channels.setdefault(match[1], {})[int(match[2])] = path
        else:
            others.append(path)
    if not channels:
        raise InputError(f"{images}: no images named CASE_0000{file_ending}; name each channel of a case that way")
    for path in others:
        if path.name.removesuffix(file_ending) not in channels:  # CASE.nii.gz beside CASE_0000.nii.gz is its segmentation
            raise InputError(f"{path}: an image must be named CASE_0000{file_ending}, four digits being the channel; rename it, or take it "
                             "out of the folder")
    for case_id, found in channels.items():
        for number, name in enumerate(channel_names):
            if number not in found:
                raise InputError(f"case {case_id}: channel {number} ({name}) is missing; expected the file "
                                 f"{images / f'{case_id}_{number:04d}{file_ending}'}")
        surplus = sorted(set(found) - set(range(len(channel_names))))
        if surplus:
            raise InputError(f"case {case_id}: {found[surplus[0]]} is a channel too many; the network takes "
                             f"{len(channel_names)}: {', '.join(channel_names)}")
    return tuple(Case(case_id, tuple(found[n] for n in sorted(found)), None) for case_id, found in channels.items())


def check_geometry(case: Case) -> None:
    """All channels of a case must lie on the grid of its first; InputError naming case, file and both values."""
    first = read_header(case.images[0])
    for path in case.images[1:]:
        header = read_header(path)
        if header.shape != first.shape:
            raise InputError(f"case {case.id}: {path} has {header.shape} voxels, its channel 0 has {first.shape}; "
                             "resample the channels to one grid")
        off = geometry_difference(first, header)
        if off > GEOMETRY_TOLERANCE * min(first.spacing):
            raise InputError(f"case {case.id}: {path} has another affine (spacing, origin or direction) than its "
                             f"channel 0, up to {off:.3g} mm off; resample the channels to one grid, or copy the header if the "
                             "voxels already agree")


def _write_probabilities(path: Path, probabilities: np.ndarray) -> None:
    temporary = path.with_name(f".{path.stem}.tmp.npz")
    try:
        np.savez_compressed(temporary, probabilities=probabilities)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
