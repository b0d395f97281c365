"""Evaluate a folder of predicted label maps: nnU-Net's summary.json, and what it leaves unsaid beside it.

nnU-Net's `foreground_mean` is NaN as soon as one class is NaN in every case. It is kept as it is, so that numbers can
be compared; `foreground_mean_nan_safe` leaves such classes out, and `cases_behind_mean` tells how many cases each
class' Dice was averaged over.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pgps_jax.data.dataset import default_workers
from pgps_jax.data.labels import WHOLE, Label, Labels
from pgps_jax.data.nifti import NIFTI_ENDINGS, SITK_ENDINGS, Volume, read_volume
from pgps_jax.errors import InputError
from pgps_jax.evaluate.metrics import Metrics, overlap_metrics
from pgps_jax.evaluate.surface import lesion_metrics, surface_metrics

ENDINGS = NIFTI_ENDINGS + SITK_ENDINGS


def evaluate_folder(
    predictions: Path,
    references: Path | Mapping[str, Path],
    labels: Labels,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    output: Path | None = None,
    surface_tolerance: float | None = None,
    lesions: bool = False,
) -> dict:
    """Compare every predicted file with the reference of the same name and write `summary.json`.

    References without a prediction are not evaluated, as in nnU-Net; `without_prediction` names them.

    Args:
        predictions: folder of label maps, one file per case, or of the folds of a run; see `label_maps`.
        references: folder of label maps of the same names, or the label map of each case id.
        labels: of the dataset; files are compared by the integers that they hold (`labels.in_files`).
        workers: threads; default one per core.
        progress: called with (cases done, cases in all) after each case.
        output: where to write; default `predictions/summary.json`.
        surface_tolerance: mm; adds HD95, ASSD and NSD at this tolerance (`surface_metrics`).
        lesions: adds the F1 score over connected components (`lesion_metrics`).

    Returns:
        what was written; see `summarise`.

    Raises:
        InputError: no predictions, a missing or unreadable file, differing shapes, values that are no labels, the
            output's folder is missing or not writable, or the library for surface distances is not installed.
    """
    predictions = Path(predictions)
    output = Path(output) if output else predictions / "summary.json"
    pairs = match_files(predictions, references)
    check_output_file(output)
    done = 0
    labels = labels.in_files
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        results = []
        for result in pool.map(lambda pair: _evaluate_case(*pair, labels, surface_tolerance, lesions), pairs):
            results.append(result)
            done += 1
            if progress:
                progress(done, len(pairs))
    summary = summarise(results, labels.foreground)
    write_summary(summary, output)
    return summary


def match_files(predictions: Path, references: Path | Mapping[str, Path]) -> list[tuple[str, Path, Path]]:
    """(case id, prediction, reference) of every label map in the predictions' folder, sorted by case id."""
    found = label_maps(predictions)
    references = references_of(references)
    missing = sorted(set(found) - set(references))
    if missing:
        raise InputError(
            f"{len(missing)} of {len(found)} predictions in {predictions} have no reference label map: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. File names of both must be the same."
        )
    return [(case, found[case], Path(references[case])) for case in sorted(found)]


def label_maps(predictions: Path) -> dict[str, Path]:
    """Label map of each case: of the folder itself, or, where it has none, of `validation` in a run or in all its folds.

    The fold "all" counts only where it is the only one. Hidden files, which killed writers and macOS leave, are no label maps.

    Raises:
        InputError: no folder, no label maps, or a case in several folds.
    """
    if not predictions.is_dir():
        raise InputError(f"There is no folder {predictions} with predictions to evaluate.")
    numbered = sorted(predictions.glob("fold_[0-9]*/validation"))
    folders = [predictions, predictions / "validation", *(numbered or predictions.glob("fold_all/validation"))]
    of_folder = {folder: files for folder in folders if (files := _label_maps_in(folder))}
    if predictions in of_folder:
        return of_folder[predictions]
    found: dict[str, Path] = {}
    for folder, files in of_folder.items():
        if twice := sorted(found.keys() & files.keys()):
            raise InputError(f"{predictions}: case {twice[0]} was predicted in several folds, the last {folder}; give the folds one by one")
        found |= files
    if not found:
        raise InputError(f"{predictions} holds no label maps ({', '.join(ENDINGS)}) to evaluate.")
    return found


def references_of(references: Path | Mapping[str, Path]) -> Mapping[str, Path]:
    """Reference label map of each case; InputError where there is no such folder."""
    if isinstance(references, Mapping):
        return {case: path for case, path in references.items() if path is not None}
    if not Path(references).is_dir():
        raise InputError(f"There is no folder {references} with reference label maps.")
    return _label_maps_in(references)


def without_prediction(predictions: Path, references: Path | Mapping[str, Path]) -> list[str]:
    """Cases that have a reference but no prediction, and so do not count."""
    return sorted(set(references_of(references)) - set(label_maps(predictions)))


def _label_maps_in(folder: Path) -> dict[str, Path]:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {case_id_of(path): path for path in files if path.name.endswith(ENDINGS) and not path.name.startswith(".")}


def case_id_of(path: Path) -> str:
    """File name without the ending of its format."""
    return next(path.name.removesuffix(ending) for ending in ENDINGS if path.name.endswith(ending))


def read_label_pair(case: str, prediction: Path, reference: Path) -> tuple[np.ndarray, np.ndarray, tuple]:
    """Both label maps as int32 (d, h, w), and the reference's spacing in mm."""
    predicted, true = (read_label_map(case, path) for path in (prediction, reference))
    if predicted.array.shape != true.array.shape:
        raise InputError(
            f"Case {case}: the prediction {prediction} has shape {predicted.array.shape} (d, h, w) but its reference "
            f"{reference} has {true.array.shape}; both must lie on the same grid."
        )
    return predicted.array, true.array, true.spacing


def read_label_map(case: str, path: Path) -> Volume:
    """A label map with int32 voxels; values that a scaled header left next to a whole number are rounded, as before training."""
    volume = read_volume(path)
    values = np.rint(volume.array)
    if not (np.abs(values - volume.array) <= WHOLE).all() or np.abs(values).max() >= 2**24:
        raise InputError(f"Case {case}: {path} is no label map; labels are whole numbers below 2^24.")
    return volume._replace(array=values.astype(np.int32))


def _evaluate_case(
    case: str, prediction: Path, reference: Path, labels: Labels, surface_tolerance: float | None, lesions: bool
) -> dict:
    predicted, true, spacing = read_label_pair(case, prediction, reference)
    wanted, ignore = labels.foreground, labels.ignore
    parts = [overlap_metrics(predicted, true, wanted, ignore)]
    if surface_tolerance is not None:
        parts.append(surface_metrics(predicted, true, wanted, spacing, surface_tolerance, ignore))
    if lesions:
        parts.append(lesion_metrics(predicted, true, wanted, ignore))
    metrics = {label: {name: value for part in parts for name, value in part[label].items()} for label in wanted}
    return {"metrics": metrics, "prediction_file": str(prediction), "reference_file": str(reference)}


def summarise(cases: Sequence[dict], labels: Sequence[Label]) -> dict:
    """Averages over cases in the schema of nnU-Net's summary.json.

    Args:
        cases: one dictionary per case with `metrics` (of `overlap_metrics` and others), `prediction_file`,
            `reference_file`.

    Returns:
        nnU-Net's `mean` (per label over the cases that are not NaN), `foreground_mean` (over labels; NaN if any label
        is), `metric_per_case`, and our `foreground_mean_nan_safe` and `cases_behind_mean`. Labels are text; a region is
        the text of its tuple.
    """
    mean = {str(label): mean_over([case["metrics"][label] for case in cases]) for label in labels}
    names = list(next(iter(mean.values()))) if mean else []
    return {
        "foreground_mean": {name: float(np.mean([mean[label][name] for label in mean])) for name in names},
        "foreground_mean_nan_safe": mean_over(list(mean.values())),
        "mean": mean,
        "cases_behind_mean": {
            str(label): sum(not math.isnan(case["metrics"][label]["Dice"]) for case in cases) for label in labels
        },
        "metric_per_case": [
            {**case, "metrics": {str(label): case["metrics"][label] for label in labels}} for case in cases
        ],
    }


def mean_over(metrics: Sequence[Metrics]) -> dict[str, float]:
    """Mean of each metric over those entries in which it is not NaN; NaN if there are none."""
    means = {}
    for name in metrics[0] if metrics else ():
        values = [entry[name] for entry in metrics if not math.isnan(entry[name])]
        means[name] = float(np.mean(values)) if values else float("nan")
    return means


def write_summary(summary: dict, path: Path) -> None:
    """Write JSON with sorted keys, atomically; NaN stays NaN as nnU-Net writes it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(summary, sort_keys=True, indent=1))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output_file(path: Path) -> None:
    """Raise InputError if no file can be written under this name; asked before anything is computed for it."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: cannot be written; name a file in a folder that exists and that you may write to (--output)")
