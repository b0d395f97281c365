"""Full-volume measurement of a trained run on its validation cases, and loading a run for prediction."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pgps_jax.curriculum import schedule_from_json
from pgps_jax.data.dataset import channel_names, file_ending
from pgps_jax.data.labels import Labels
from pgps_jax.data.nifti import axis_codes, read_header, write_volume
from pgps_jax.data.plan import read_plan
from pgps_jax.data.preprocess import Preprocessed
from pgps_jax.errors import InputError
from pgps_jax.evaluate.summary import evaluate_folder
from pgps_jax.infer.predict import MADE_BY, Predictor, find_cases, make_predictor
from pgps_jax.inference import read_inference
from pgps_jax.json_file import read_json, write_json
from pgps_jax.train.checkpoint import load_params
from pgps_jax.workspace import Experiment

Callback = Callable[[int, int], None]
MEASURES = ("Dice", "HD95", "ASSD", "NSD", "LesionF1")  # that the console shows, where they were measured


def validate(run: Experiment, progress: Callback | None = None) -> dict:
    """Predict the validation cases of a finished run with a sliding window and compare them with their references.

    Writes RUN/validation/CASE.nii.gz and summary.json (nnU-Net's schema) and returns the summary. Cases that an
    interrupted validation has written are not predicted again, unless it predicted otherwise (predict.json).
    """
    folder, ending = run.folder / "validation", run.dataset_json["file_ending"]
    folder.mkdir(exist_ok=True)
    keep_if_made_by({"mirror_tta": run.config.mirror_tta}, folder,
                    [folder / "summary.json", *(folder / f"{case_id}{ending}" for case_id in run.validation_ids)])
    if (folder / "summary.json").exists():
        return read_json(folder / "summary.json")
    predictor = load_predictor(run.folder, mirror=run.config.mirror_tta)
    for done, case_id in enumerate(run.validation_ids):
        if progress:
            progress(done, len(run.validation_ids))
        target = folder / f"{case_id}{ending}"
        if target.exists():
            continue
        stored = run.store.open(case_id)
        case = Preprocessed(np.asarray(stored.image[:], np.float32), np.asarray(stored.seg[:]), stored.properties, {})
        affine = np.asarray(stored.properties["nibabel_stuff"]["original_affine"], np.float64)
        write_volume(target, predictor.restore(predictor.logits(case), case), affine)
    if progress:
        progress(len(run.validation_ids), len(run.validation_ids))
    return evaluate_folder(folder, run.preprocessed / "gt_segmentations", run.labels.in_files, run.config.workers)


def keep_if_made_by(made_by: dict, folder: Path, files: Sequence[Path]) -> None:
    """Delete files that an earlier validation made otherwise: one mean must not be over two kinds of predictions."""
    known = folder / MADE_BY
    if known.exists() and read_json(known) == made_by:
        return
    for file in files:
        file.unlink(missing_ok=True)
    write_json(known, made_by)


def fold_folders(run: Path) -> list[Path]:
    """The run folder itself, or the fold_<k> run folders in it; fold_all only where it is the only one.

    Raises InputError when it is neither, or the folds cannot be used as one network.
    """
    if not run.is_dir():
        raise InputError(f"{run}: no such run folder")
    folds = [run] if (run / "plan.json").exists() else sorted(f for f in run.glob("fold_*") if (f / "plan.json").exists())
    folds = [fold for fold in folds if fold.name != "fold_all"] or folds
    if not folds:
        raise InputError(f"{run}: neither a run folder (with plan.json) nor a folder of fold_<k> run folders")
    first = _needs(folds[0]) if len(folds) > 1 else {}
    for fold in folds[1:]:
        if other := [name for name, value in _needs(fold).items() if value != first[name]]:
            raise InputError(f"{fold}: its {' and '.join(other)} are not those of {folds[0]}, so the two are no folds of one network; use "
                             "them one by one, or move one away")
    return folds


def _needs(fold: Path) -> dict[str, Any]:
    """What of each file of a run folder prediction depends on."""
    plan, content = read_plan(fold / "plan.json"), read_json(fold / "dataset.json")
    inference = read_inference(fold, plan)
    configuration = dataclasses.replace(plan.configurations[inference.configuration], batch_size=1)
    return {
        "plan.json": (configuration, plan.transpose_forward, plan.intensity_properties),
        "dataset.json": (Labels.from_json(content), channel_names(fold, content), file_ending(fold, content)),
        "inference.json": inference,
    }


def checkpoint_steps(run: Path, checkpoint: str = "last") -> dict[str, int]:
    """Steps of training behind the newest checkpoint of each fold, by the name of its folder; folds without one are left out."""
    steps = {fold.resolve().name: [int(path.name) for path in (fold / "checkpoints" / checkpoint).glob("*") if path.name.isdigit()]
             for fold in fold_folders(run)}
    return {name: max(found) for name, found in steps.items() if found}


def unfinished(run: Path) -> list[str]:
    """Folds that were not trained to the end of their schedule, such as "fold_3: step 4000 of 250000".

    Imported folds, which have no schedule, are taken as finished.
    """
    steps, sentences = checkpoint_steps(run), []
    for fold in fold_folders(run):
        name = fold.resolve().name
        if name in steps and (fold / "schedule.json").exists():
            whole = len(schedule_from_json(read_json(fold / "schedule.json")).stage_of_step)
            sentences += [f"{name}: step {steps[name]} of {whole}"] if steps[name] < whole else []
    return sentences


def load_predictor(run: Path, checkpoint: str = "last", mirror: bool = True, step: float = 0.5, skip_outside: bool = False) -> Predictor:
    """Predictor of a run folder (fold_<k>), or of all folds when `run` is the folder above them.

    Raises InputError naming what is missing, or what differs between the folds.
    """
    folds = fold_folders(run)
    plan, dataset_json = read_plan(folds[0] / "plan.json"), read_json(folds[0] / "dataset.json")
    inference = read_inference(folds[0], plan)
    configuration = plan.configurations[inference.configuration]
    return make_predictor(
        plan, configuration, Labels.from_json(dataset_json), channel_names(folds[0], dataset_json),
        [load_params(fold / "checkpoints", checkpoint) for fold in folds],
        file_ending=file_ending(folds[0], dataset_json), mirror=mirror, mirror_axes=inference.mirror_axes, step=step,
        skip_outside=skip_outside, swap_axis=inference.swap_axis, swap_pairs=inference.swap_pairs,
        orientation=inference.orientation,  # most imported models do not know theirs: images are taken as they are
        dtype=np.dtype(np.float32) if inference.precision == "float32" else None,
    )


def other_orientations(predictor: Predictor, images: Path) -> str | None:
    """Which images of a folder are stored in another orientation than the training's, such as "3 RAS, 1 SPL"; None for none."""
    if predictor.orientation is None:
        return None
    cases = find_cases(images, predictor.channel_names, predictor.file_ending)
    codes = Counter(axis_codes(read_header(case.images[0]).affine) for case in cases)
    return ", ".join(f"{number} {code}" for code, number in codes.most_common() if code != predictor.orientation) or None


def dice_table(summary: dict, labels: Labels, cases: str = "cases") -> Table:
    """Means per class for the console: Dice, and what else was measured. Classes that no case holds are said to be absent.

    The mean over classes is nnU-Net's, which is no number if a class is absent; then that of the others stands below it.

    Args:
        labels: of the dataset.
        cases: what the means are over, for the title.
    """
    table = Table(title=f"Dice over {len(summary['metric_per_case'])} {cases}")
    mean, labels = summary["mean"], labels.in_files
    shown = [measure for measure in MEASURES if all(measure in metrics for metrics in mean.values())]
    table.add_column("class")
    for measure in shown:
        table.add_column(f"{measure}, mm" if measure in ("HD95", "ASSD") else measure, justify="right")
    names = {str(value): name for name, value in zip(labels.names, labels.values, strict=True)}
    for key, metrics in mean.items():
        table.add_row(names.get(key, key), *(_number(metrics[measure], "absent") for measure in shown))
    overall, present = summary["foreground_mean"], summary.get("foreground_mean_nan_safe")
    table.add_row("mean", *(_number(overall[measure], "nan") for measure in shown), style="bold")
    if present and any(_number(overall[measure], "nan") != _number(present[measure], "nan") for measure in shown):
        table.add_row("mean without absent", *(_number(present[measure], "nan") for measure in shown), style="bold")
    return table


def _number(value: float | None, missing: str) -> str:
    return missing if value is None or math.isnan(value) else f"{value:.4f}"
