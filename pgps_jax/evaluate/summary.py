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
from pgps_jax.data.labels import Label, Labels
from pgps_jax.data.nifti import NIFTI_ENDINGS, SITK_ENDINGS, read_volume
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

    References without a prediction are not evaluated, as in nnU-Net.

    Args:
        predictions: folder of label maps, one file per case.
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
        InputError: no predictions, a missing or unreadable file, differing shapes, values that are no labels, or the
            library for surface distances is not installed.
    """
    predictions = Path(predictions)
    pairs = match_files(predictions, references)
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
    write_summary(summary, Path(output) if output else predictions / "summary.json")
    return summary


def match_files(predictions: Path, references: Path | Mapping[str, Path]) -> list[tuple[str, Path, Path]]:
    """(case id, prediction, reference) of every label map in the predictions' folder, sorted by case id."""
    if not predictions.is_dir():
        raise InputError(f"There is no folder {predictions} with predictions to evaluate.")
    found = {case_id_of(path): path for path in sorted(predictions.iterdir()) if path.name.endswith(ENDINGS)}
    if not found:
        raise InputError(f"{predictions} holds no label maps ({', '.join(ENDINGS)}) to evaluate.")
    if not isinstance(references, Mapping):
        if not Path(references).is_dir():
            raise InputError(f"There is no folder {references} with reference label maps.")
        files = [path for path in Path(references).iterdir() if path.name.endswith(ENDINGS)]
        references = {case_id_of(path): path for path in files}
    missing = sorted(set(found) - {case for case, path in references.items() if path is not None})
    if missing:
        raise InputError(
            f"{len(missing)} of {len(found)} predictions in {predictions} have no reference label map: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. File names of both must be the same."
        )
    return [(case, found[case], Path(references[case])) for case in sorted(found)]


def case_id_of(path: Path) -> str:
    """File name without the ending of its format."""
    return next(path.name.removesuffix(ending) for ending in ENDINGS if path.name.endswith(ending))


def read_label_pair(case: str, prediction: Path, reference: Path) -> tuple[np.ndarray, np.ndarray, tuple]:
    """Both label maps as int32 (d, h, w), and the reference's spacing in mm."""
    maps = []
    for path in (prediction, reference):
        volume = read_volume(path)
        values = np.rint(volume.array)
        if not np.array_equal(values, volume.array) or np.abs(values).max() >= 2**24:
            raise InputError(f"Case {case}: {path} is no label map; labels are whole numbers below 2^24.")
        maps.append(values.astype(np.int32))
    if maps[0].shape != maps[1].shape:
        raise InputError(
            f"Case {case}: the prediction {prediction} has shape {maps[0].shape} (d, h, w) but its reference "
            f"{reference} has {maps[1].shape}; both must lie on the same grid."
        )
    return maps[0], maps[1], volume.spacing


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
    temporary.write_text(json.dumps(summary, sort_keys=True, indent=1))
    os.replace(temporary, path)
