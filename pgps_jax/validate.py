"""Full-volume measurement of a trained run on its validation cases, and loading a run for prediction."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.table import Table

from pgps_jax.data.dataset import channel_names, file_ending
from pgps_jax.data.labels import Labels
from pgps_jax.data.nifti import axis_codes, read_header, write_volume
from pgps_jax.data.plan import read_plan
from pgps_jax.data.preprocess import Preprocessed
from pgps_jax.errors import InputError
from pgps_jax.evaluate.summary import evaluate_folder
from pgps_jax.infer.predict import Predictor, find_cases, make_predictor
from pgps_jax.inference import read_inference
from pgps_jax.json_file import read_json
from pgps_jax.train.checkpoint import load_params
from pgps_jax.workspace import Experiment

Callback = Callable[[int, int], None]


def validate(run: Experiment, progress: Callback | None = None) -> dict:
    """Predict the validation cases of a finished run with a sliding window and compare them with their references.

    Writes RUN/validation/CASE.nii.gz and summary.json (nnU-Net's schema) and returns the summary. Cases that an
    interrupted validation has written are not predicted again.
    """
    folder = run.folder / "validation"
    if (folder / "summary.json").exists():
        return read_json(folder / "summary.json")
    folder.mkdir(exist_ok=True)
    ending = run.dataset_json["file_ending"]
    predictor = load_predictor(run.folder, mirror=run.config.mirror_tta)
    for done, case_id in enumerate(run.validation_ids):
        if progress:
            progress(done, len(run.validation_ids))
        target = folder / f"{case_id}{ending}"
        if target.exists():
            continue
        stored = run.store.open(case_id)
        case = Preprocessed(np.asarray(stored.image[:], np.float32), np.asarray(stored.seg[:]), stored.properties, {})
        affine = np.asarray(stored.properties["nibabel_stuff"]["original_affine"])
        write_volume(target, predictor.restore(predictor.logits(case), case), affine)
    if progress:
        progress(len(run.validation_ids), len(run.validation_ids))
    return evaluate_folder(folder, run.preprocessed / "gt_segmentations", run.labels.in_files, run.config.workers)


def fold_folders(run: Path) -> list[Path]:
    """The run folder itself, or the fold_<k> run folders in it; InputError when it is neither."""
    if not run.is_dir():
        raise InputError(f"{run}: no such run folder")
    folds = [run] if (run / "plan.json").exists() else sorted(f for f in run.glob("fold_*") if (f / "plan.json").exists())
    if not folds:
        raise InputError(f"{run}: neither a run folder (with plan.json) nor a folder of fold_<k> run folders")
    return folds


def load_predictor(run: Path, checkpoint: str = "last", mirror: bool = True, step: float = 0.5, skip_outside: bool = False) -> Predictor:
    """Predictor of a run folder (fold_<k>), or of all folds when `run` is the folder above them.

    Raises InputError naming what is missing.
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
        orientation=inference.orientation,  # imported models do not know theirs: images are taken as they are
    )


def other_orientations(predictor: Predictor, images: Path) -> str | None:
    """Which images of a folder are stored in another orientation than the training's, such as "3 RAS, 1 SPL"; None for none."""
    if predictor.orientation is None:
        return None
    cases = find_cases(images, predictor.channel_names, predictor.file_ending)
    codes = Counter(axis_codes(read_header(case.images[0]).affine) for case in cases)
    return ", ".join(f"{number} {code}" for code, number in codes.most_common() if code != predictor.orientation) or None


def dice_table(summary: dict, labels: Labels) -> Table:
    """Mean Dice per class for the console; classes that no case holds are said to be absent."""
    table = Table(title=f"Dice over {len(summary['metric_per_case'])} cases")
    table.add_column("class")
    table.add_column("Dice", justify="right")
    names = {str(value): name for name, value in zip(labels.names, labels.values, strict=True)}
    for key, metrics in summary["mean"].items():
        dice = metrics["Dice"]
        table.add_row(names.get(key, key), "absent" if dice is None or math.isnan(dice) else f"{dice:.4f}")
    table.add_row("mean", f"{summary['foreground_mean']['Dice']:.4f}", style="bold")
    return table
