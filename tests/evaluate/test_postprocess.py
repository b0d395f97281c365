"""Largest components and the decision to keep only these, against nnU-Net's."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pgps_jax.data.dataset import Labels
from pgps_jax.data.nifti import read_volume, write_volume
from pgps_jax.errors import InputError
from pgps_jax.evaluate.postprocess import (
    Postprocessing,
    apply_postprocessing,
    decide_postprocessing,
    keep_largest_component,
    read_postprocessing,
    write_postprocessing,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluate"


def test_the_largest_component_is_nnunets(golden):
    arrays, sidecar = golden("evaluate/largest_component")
    for output, source, label in [
        ("all_foreground", "labels", (1, 2)),
        ("label1", "labels", 1),
        ("label2", "labels", 2),
        ("tie", "tie", 1),
        ("diagonal", "diagonal", 1),
    ]:
        before = arrays[f"{source}_in"]
        after = keep_largest_component(before, label)
        np.testing.assert_array_equal(after, arrays[f"out_{output}"])
        assert (before != after).sum() == sidecar["removed"][output] and after.dtype == before.dtype


@pytest.mark.parametrize("name", ["all_then_labels", "label_two_only", "nothing"])
def test_decisions_are_nnunets(tmp_path, name):
    folder = GOLDEN / f"postprocessing_{name}"
    theirs = json.loads((folder / "decision.json").read_text())
    labels = Labels.from_json(theirs["dataset_json"])
    seen = []
    decision = decide_postprocessing(folder / "pred", folder / "ref", labels, 2, lambda *c: seen.append(c))
    expected = [a["labels_or_regions"] for a in theirs["arguments"]]
    assert list(decision.postprocessing.keep_largest_of) == [tuple(e) if isinstance(e, list) else e for e in expected]
    for ours, when in ((decision.before, "before"), (decision.after, "after")):
        assert {str(label): dice for label, dice in ours.items()} == pytest.approx(theirs["dice"][when]["mean_Dice"])
    assert seen == [(1, 3), (2, 3), (3, 3)]

    write_postprocessing(decision, tmp_path / "postprocessing.json")
    postprocessing = read_postprocessing(tmp_path / "postprocessing.json")
    assert postprocessing == decision.postprocessing
    apply_postprocessing(postprocessing, folder / "pred", tmp_path / "out")
    for path in sorted((folder / "postprocessed").iterdir()):
        np.testing.assert_array_equal(read_volume(tmp_path / "out" / path.name).array, read_volume(path).array)
        np.testing.assert_array_equal(read_volume(tmp_path / "out" / path.name).affine, read_volume(path).affine)


def blobs(*voxels: tuple[int, int]) -> np.ndarray:
    seg = np.zeros((1, 1, 40), np.uint8)
    for start, label in voxels:
        seg[0, 0, start : start + 4] = label
    return seg


def test_a_class_that_never_occurs_does_not_stop_the_decision(tmp_path):
    for name, seg in (("pred", blobs((0, 1), (4, 1), (20, 1))), ("ref", blobs((0, 1), (4, 1)))):
        (tmp_path / name).mkdir()
        write_volume(tmp_path / name / "x.nii.gz", seg, np.eye(4))
    labels = Labels.from_json({"labels": {"background": 0, "a": 1, "never": 2}})
    decision = decide_postprocessing(tmp_path / "pred", tmp_path / "ref", labels)
    assert decision.postprocessing == Postprocessing(((1, 2),))
    assert decision.after[1] == 1 and np.isnan(decision.after[2])


def test_a_step_that_harms_one_class_is_not_taken_for_all(tmp_path):
    # Keeping the largest component of all foreground would repair label 1 and delete the true label 2.
    predicted, true = blobs((0, 1), (4, 1), (12, 1), (30, 2)), blobs((0, 1), (4, 1), (30, 2))
    for name, seg in (("pred", predicted), ("ref", true)):
        (tmp_path / name).mkdir()
        write_volume(tmp_path / name / "x.nii.gz", seg, np.eye(4))
    labels = Labels.from_json({"labels": {"background": 0, "a": 1, "b": 2}})
    decision = decide_postprocessing(tmp_path / "pred", tmp_path / "ref", labels)
    assert decision.postprocessing == Postprocessing((1,)) and decision.after == {1: 1.0, 2: 1.0}


def test_files_that_are_no_decision_and_empty_folders_are_refused(tmp_path):
    for text in ("{}", "no json", '{"keep_largest_component_of": [["x"]]}'):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(InputError, match=r"p\.json"):
            read_postprocessing(tmp_path / "p.json")
    with pytest.raises(InputError, match="no label maps"):
        apply_postprocessing(Postprocessing(), tmp_path, tmp_path / "out")


def test_postprocessing_in_place_overwrites_the_folder(tmp_path):
    shutil.copytree(GOLDEN / "postprocessing_label_two_only" / "pred", tmp_path / "pred")
    apply_postprocessing(Postprocessing((2,)), tmp_path / "pred", tmp_path / "pred")
    theirs = GOLDEN / "postprocessing_label_two_only" / "postprocessed"
    for path in theirs.iterdir():
        np.testing.assert_array_equal(read_volume(tmp_path / "pred" / path.name).array, read_volume(path).array)


def test_a_folder_that_cannot_be_made_is_refused_and_hidden_files_are_left_alone(tmp_path):
    shutil.copytree(GOLDEN / "postprocessing_label_two_only" / "pred", tmp_path / "pred")
    (tmp_path / "pred" / "._x.nii.gz").write_bytes(b"no label map")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        apply_postprocessing(Postprocessing((2,)), tmp_path / "pred", tmp_path / "file" / "out")
    apply_postprocessing(Postprocessing((2,)), tmp_path / "pred", tmp_path / "out")
    assert not (tmp_path / "out" / "._x.nii.gz").exists()
