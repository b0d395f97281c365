"""Which folds of a run predict together, what is said of them, and validation of a run on its own cases."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from pgps_jax.config import RunConfig
from pgps_jax.curriculum import Schedule, Stage, schedule_to_json
from pgps_jax.data.dataset import RawCase
from pgps_jax.data.labels import Labels
from pgps_jax.data.nifti import Volume, axis_codes, read_volume, reorient, write_volume
from pgps_jax.data.plan import read_plan
from pgps_jax.data.preprocess import preprocess_case
from pgps_jax.data.store import CaseStore, write_case
from pgps_jax.errors import InputError
from pgps_jax.main import main
from pgps_jax.preparation import check_references
from pgps_jax.train.checkpoint import Checkpoints
from pgps_jax.train.state import TrainState
from pgps_jax.validate import dice_table, fold_folders, load_predictor, unfinished, validate
from pgps_jax.workspace import Experiment


@pytest.fixture
def folds(run, tmp_path):
    """A run of two folds."""
    for k in (0, 1):
        shutil.copytree(run, tmp_path / "folds" / f"fold_{k}")
    return tmp_path / "folds"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("file, values", [
    ("plan.json", {"transpose_forward": [2, 0, 1]}),
    ("dataset.json", {"labels": {"background": 0, "b": 1, "a": 2}}),
    ("inference.json", {"orientation": "RAS"}),
])  # fmt: skip
def test_folds_that_are_not_of_one_network_are_not_averaged(folds, file, values):
    assert len(load_predictor(folds).fold_params) == 2
    change(folds / "fold_1" / file, **values)
    with pytest.raises(InputError, match=rf"fold_1: its {file} are not those of .*fold_0"):
        load_predictor(folds)


def test_folds_may_differ_in_what_prediction_does_not_need(folds):
    change(folds / "fold_1" / "dataset.json", numTraining=17)
    assert len(fold_folders(folds)) == 2


def test_the_fold_of_all_cases_counts_only_alone(folds):
    shutil.copytree(folds / "fold_0", folds / "fold_all")
    assert [fold.name for fold in fold_folders(folds)] == ["fold_0", "fold_1"]
    for k in (0, 1):
        shutil.rmtree(folds / f"fold_{k}")
    assert [fold.name for fold in fold_folders(folds)] == ["fold_all"]


def schedule_of(steps):
    return schedule_to_json(Schedule((Stage(0, (8, 8, 8), 2),), np.zeros(steps, np.int32), np.ones(steps, np.int32)))


def test_unfinished_folds_are_told_with_their_step(folds):
    assert unfinished(folds) == [], "imported folds have no schedule"
    for k, step in ((0, 300), (1, 40)):
        (folds / f"fold_{k}" / "schedule.json").write_text(json.dumps(schedule_of(300)))
        with Checkpoints(folds / f"fold_{k}" / "checkpoints") as checkpoints:
            checkpoints.save("last", TrainState(jnp.int32(step), {}, {}), step, {})
    assert unfinished(folds) == ["fold_1: step 40 of 300"]
    assert unfinished(folds / "fold_1") == ["fold_1: step 40 of 300"] and unfinished(folds / "fold_0") == []


def test_predict_says_what_it_kept_and_refuses_the_folder_of_another_run(folds, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for case in "ab":
        write_volume(tmp_path / "in" / f"{case}_0000.nii.gz", np.ones((8, 8, 8), np.float32), np.diag([-1.0, -1, 1, 1]))

    def predict(run, *flags):
        return main(["predict", str(run), "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--no-mirror-tta", *flags])

    assert predict(folds / "fold_0") == 0
    (tmp_path / "out" / "b.nii.gz").unlink()
    assert predict(folds / "fold_0") == 0
    assert "1 segmentations written, 1 kept (--overwrite makes them again)" in capsys.readouterr().out
    assert predict(folds / "fold_1") == 2 and predict(folds / "fold_0", "--step-size", "0.25") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert predict(folds / "fold_1", "--overwrite") == 0


@pytest.fixture
def trained(run, tmp_path):
    """An experiment that has come to its validation: one case, which nnU-Net's reorienting reader turned from LPS to RAS."""
    preprocessed, lps = tmp_path / "preprocessed", np.diag([-1.0, -1, 1, 1])
    (preprocessed / "cases").mkdir(parents=True)
    (preprocessed / "gt_segmentations").mkdir()
    change(run / "inference.json", orientation="RAS")
    plan, content = read_plan(run / "plan.json"), json.loads((run / "dataset.json").read_text())
    labels = Labels.from_json(content)
    image = np.random.default_rng(1).normal(1, 1, (9, 11, 10)).astype(np.float32)
    turned, ras = reorient(image, lps, "RAS")
    case = preprocess_case(RawCase(turned[None], None, (1.0, 1.0, 1.0), ras), plan, plan.configurations["3d_fullres"], labels)
    case.properties["nibabel_stuff"] = {"original_affine": lps.tolist(), "reoriented_affine": ras.tolist()}
    write_case(preprocessed / "cases", "one", case, (8, 8, 8))
    write_volume(preprocessed / "gt_segmentations" / "one.nii.gz", (image > 1).astype(np.uint8), lps)
    experiment = object.__new__(Experiment)
    vars(experiment).update(
        config=RunConfig(tmp_path, mirror_tta=False, workers=1), folder=run, preprocessed=preprocessed, dataset_json=content, labels=labels,
        store=CaseStore(preprocessed / "cases"), validation_ids=("one",))
    return experiment, image, lps


def test_validation_turns_what_nnunets_reader_turned_back_to_the_references(trained):
    experiment, image, lps = trained
    summary = validate(experiment)
    written = read_volume(experiment.folder / "validation" / "one.nii.gz")
    assert axis_codes(written.affine) == "LPS"
    predictor = dataclasses.replace(load_predictor(experiment.folder, mirror=False), orientation=None)
    turned, ras = reorient(image, lps, "RAS")
    as_trained = predictor.predict_case([Volume(turned, (1.0, 1.0, 1.0), ras)])
    np.testing.assert_array_equal(written.array, reorient(as_trained, ras, "LPS")[0])
    assert summary["mean"]["1"]["n_pred"] > 0


def test_validation_with_other_mirroring_is_made_anew_and_the_same_is_kept(trained):
    experiment, *_ = trained
    change(experiment.folder / "inference.json", mirror_axes=[0, 1, 2])
    plain, target = validate(experiment), experiment.folder / "validation" / "one.nii.gz"
    made = target.stat().st_mtime_ns
    assert validate(experiment)["mean"] == plain["mean"] and target.stat().st_mtime_ns == made
    vars(experiment)["config"] = RunConfig(experiment.config.dataset, mirror_tta=True, workers=1)
    mirrored = validate(experiment)
    assert target.stat().st_mtime_ns != made
    assert mirrored["mean"]["1"]["n_pred"] != plain["mean"]["1"]["n_pred"], "the example should tell mirroring"


def test_missing_references_are_found_out_before_training(tmp_path):
    with pytest.raises(InputError, match=r"no folder .*gt_segmentations"):
        check_references(tmp_path, ["a"])
    (tmp_path / "gt_segmentations").mkdir()
    write_volume(tmp_path / "gt_segmentations" / "a.nii.gz", np.zeros((2, 2, 2), np.uint8), np.eye(4))
    check_references(tmp_path, ["a"])
    with pytest.raises(InputError, match="no reference label map of 1 of 2 cases, such as b"):
        check_references(tmp_path, ["a", "b"])


def rows(table):
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_the_table_shows_every_measure_and_both_means_where_a_class_is_absent():
    labels = Labels.from_json({"labels": {"background": 0, "liver": 1, "spleen": 5}})
    nan = float("nan")
    summary = {"mean": {"1": {"Dice": 0.5, "HD95": 3.0, "TP": 1}, "5": {"Dice": nan, "HD95": nan, "TP": 0}}, "metric_per_case": [{}, {}],
               "foreground_mean": {"Dice": nan, "HD95": nan, "TP": 0.5}, "foreground_mean_nan_safe": {"Dice": 0.5, "HD95": 3.0, "TP": 0.5}}
    table = dice_table(summary, labels, "training cases")
    assert table.title == "Dice over 2 training cases"
    assert [column.header for column in table.columns] == ["class", "Dice", "HD95, mm"]
    assert rows(table) == [("liver", "0.5000", "3.0000"), ("spleen", "absent", "absent"), ("mean", "nan", "nan"),
                           ("mean without absent", "0.5000", "3.0000")]
    summary["mean"]["5"] = {"Dice": 0.7, "HD95": 1.0, "TP": 1}
    summary["foreground_mean"] = summary["foreground_mean_nan_safe"] = {"Dice": 0.6, "HD95": 2.0, "TP": 1}
    assert [row[0] for row in rows(dice_table(summary, labels))] == ["liver", "spleen", "mean"]
