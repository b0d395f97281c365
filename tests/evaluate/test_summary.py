"""Counts, Dice and summary.json against nnU-Net's, and against counting voxels one label at a time."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgps_jax.data.dataset import Labels
from pgps_jax.data.nifti import read_volume, write_volume
from pgps_jax.errors import InputError
from pgps_jax.evaluate.metrics import overlap_metrics
from pgps_jax.evaluate.summary import evaluate_folder, summarise, without_prediction

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluate"
OURS = {"foreground_mean_nan_safe", "cases_behind_mean"}


def labels_of(values, ignore=None) -> Labels:
    values = (0, *(v if isinstance(v, int) else tuple(v) for v in values))
    order = None if all(isinstance(v, int) for v in values) else tuple(range(1, len(values)))
    names = tuple(f"class {i}" for i in range(len(values)))
    return Labels(names=names, values=values, ignore=ignore, regions_class_order=order)


def equal(ours, theirs) -> bool:
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    if isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-12) or (math.isnan(ours) and math.isnan(theirs))
    return type(ours) is type(theirs) and ours == theirs


@pytest.mark.parametrize("name", ["labels", "regions", "ignore_label", "class_never_present"])
def test_the_summary_equals_nnunets(tmp_path, monkeypatch, name):
    monkeypatch.chdir(GOLDEN)  # the peer's file names are relative
    about = json.loads((GOLDEN / name / "README.json").read_text())
    labels = labels_of(about["labels_or_regions"], about["ignore_label"])
    returned = evaluate_folder(Path(name, "pred"), Path(name, "ref"), labels, output=tmp_path / "summary.json")
    text = (tmp_path / "summary.json").read_text()
    written = json.loads(text)
    theirs = json.loads((GOLDEN / name / "summary.json").read_text())
    assert equal({k: v for k, v in written.items() if k not in OURS}, theirs)
    assert equal(returned["mean"], written["mean"])
    assert text == json.dumps(written, sort_keys=True, indent=1)
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_means_tell_how_many_cases_are_behind_them():
    about = json.loads((GOLDEN / "class_never_present" / "summary.json").read_text())
    cases = about["metric_per_case"]
    cases = [{**case, "metrics": {int(label): m for label, m in case["metrics"].items()}} for case in cases]
    summary = summarise(cases, [1, 2])
    assert math.isnan(summary["foreground_mean"]["Dice"])
    assert summary["foreground_mean_nan_safe"]["Dice"] == about["mean"]["1"]["Dice"]
    assert summary["cases_behind_mean"] == {"1": 2, "2": 0}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), ignore=st.sampled_from([None, 3]), top=st.sampled_from([-4, 5, 60000]))
def test_one_table_counts_as_one_label_at_a_time(seed, ignore, top):
    rng = np.random.default_rng(seed)
    choices = np.array([0, 1, 2, 3, top])
    prediction, reference = choices[rng.integers(0, 5, (2, 4, 5, 6))].astype(np.int32)
    labels = [1, 2, (1, 2), (2, top), top, 7]
    metrics = overlap_metrics(prediction, reference, labels, ignore)
    valid = reference != ignore if ignore is not None else np.ones(reference.shape, bool)
    for label in labels:
        p, r = np.isin(prediction, label) & valid, np.isin(reference, label) & valid
        tp, fp, fn, tn = (p & r).sum(), (p & ~r).sum(), (~p & r).sum(), (~p & ~r & valid).sum()
        ours = metrics[label]
        assert (ours["TP"], ours["FP"], ours["FN"], ours["TN"]) == (tp, fp, fn, tn)
        assert (ours["n_pred"], ours["n_ref"]) == (p.sum(), r.sum())
        if tp + fp + fn:
            assert ours["Dice"] == 2 * tp / (2 * tp + fp + fn) and ours["IoU"] == tp / (tp + fp + fn)
        else:
            assert math.isnan(ours["Dice"]) and math.isnan(ours["IoU"])


def test_a_case_of_ignored_voxels_only_has_no_score():
    metrics = overlap_metrics(np.ones((2, 2, 2), np.int32), np.full((2, 2, 2), 3, np.int32), [1], ignore=3)[1]
    assert metrics["TP"] == metrics["FP"] == metrics["TN"] == 0 and math.isnan(metrics["Dice"])


@pytest.fixture
def folders(tmp_path):
    for name in ("pred", "ref"):
        shutil.copytree(GOLDEN / "labels" / name, tmp_path / name)
    return tmp_path / "pred", tmp_path / "ref"


def test_progress_counts_up_and_references_may_be_given_by_case(folders):
    predictions, references = folders
    seen = []
    by_case = {path.name.removesuffix(".nii.gz"): path for path in references.iterdir()}
    summary = evaluate_folder(predictions, by_case, labels_of([1, 2]), 1, lambda *counts: seen.append(counts))
    assert seen == [(i, 8) for i in range(1, 9)]
    assert json.loads((predictions / "summary.json").read_text())["mean"]["1"]["Dice"] == summary["mean"]["1"]["Dice"]


def test_bad_folders_are_refused_by_name_and_leave_nothing_behind(folders):
    predictions, references = folders
    labels = labels_of([1, 2])
    with pytest.raises(InputError, match="no folder"):
        evaluate_folder(predictions / "nowhere", references, labels)
    with pytest.raises(InputError, match="no folder"):
        evaluate_folder(predictions, references / "nowhere", labels)
    with pytest.raises(InputError, match="no label maps"):
        evaluate_folder(predictions.parent, references, labels)
    write_volume(predictions / "a_good.nii.gz", np.zeros((3, 4, 5), np.uint8), np.eye(4))
    with pytest.raises(InputError, match=r"a_good.*shape \(3, 4, 5\)"):
        evaluate_folder(predictions, references, labels)
    write_volume(predictions / "a_good.nii.gz", np.full((3, 4, 5), 0.5, np.float32), np.eye(4))
    with pytest.raises(InputError, match=r"a_good.*no label map"):
        evaluate_folder(predictions, references, labels)
    (references / "b_poor.nii.gz").unlink()
    with pytest.raises(InputError, match="b_poor"):
        evaluate_folder(predictions, references, labels)
    assert not (predictions / "summary.json").exists()


def test_hidden_files_are_no_predictions_and_references_without_prediction_are_counted(folders):
    predictions, references = folders
    for name in ("._a_good.nii.gz", ".writing.new.nii.gz"):
        (predictions / name).write_bytes(b"no label map")
        (references / name).write_bytes(b"no label map")
    (predictions / "b_poor.nii.gz").unlink()
    assert len(evaluate_folder(predictions, references, labels_of([1, 2]))["metric_per_case"]) == 7
    assert without_prediction(predictions, references) == ["b_poor"]


def test_labels_next_to_whole_numbers_are_read_as_training_reads_them(folders):
    predictions, references = folders
    exact = evaluate_folder(predictions, references, labels_of([1, 2]))
    for folder, off in ((predictions, 0.99998), (references, 1.00001)):
        volume = read_volume(folder / "a_good.nii.gz")
        write_volume(folder / "a_good.nii.gz", (volume.array * off).astype(np.float32), volume.affine)
    assert evaluate_folder(predictions, references, labels_of([1, 2]))["mean"] == exact["mean"]


def test_a_place_for_the_summary_that_does_not_exist_is_refused_before_anything_is_read(folders):
    predictions, references = folders
    (predictions / "a_good.nii.gz").write_bytes(b"not read")
    with pytest.raises(InputError, match=r"nowhere.*cannot be written"):
        evaluate_folder(predictions, references, labels_of([1, 2]), output=predictions / "nowhere" / "summary.json")


def test_all_folds_of_a_run_are_evaluated_together(folders, tmp_path):
    predictions, references = folders
    whole = evaluate_folder(predictions, references, labels_of([1, 2]))
    for i, path in enumerate(sorted(predictions.glob("*.nii.gz"))):
        for fold in (i % 2, "all"):
            target = tmp_path / "run" / f"fold_{fold}" / "validation"
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    merged = evaluate_folder(tmp_path / "run", references, labels_of([1, 2]))
    assert merged["mean"] == whole["mean"] and (tmp_path / "run" / "summary.json").exists()
    assert len(evaluate_folder(tmp_path / "run" / "fold_1", references, labels_of([1, 2]))["metric_per_case"]) == 4
    shutil.copy(predictions / "a_good.nii.gz", tmp_path / "run" / "fold_1" / "validation")
    with pytest.raises(InputError, match="case a_good was predicted in several folds"):
        evaluate_folder(tmp_path / "run", references, labels_of([1, 2]))


def test_a_region_of_one_label_is_called_as_nnunet_calls_it(folders):
    content = {"labels": {"background": 0, "both": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
    assert set(evaluate_folder(*folders, Labels.from_json(content))["mean"]) == {"(1, 2)", "(2,)"}
    content = {"labels": {"background": 0, "edge": [1], "core": [2]}}
    assert set(evaluate_folder(*folders, Labels.from_json(content))["mean"]) == {"1", "2"}, "without a larger region these are labels"
