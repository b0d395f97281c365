"""A Decathlon folder is a dataset like any other: fetched by name, converted on the fly."""

import json

import nibabel
import numpy as np
import pytest

from pgps_jax import main as program
from pgps_jax.data.synthetic import write_phantom_dataset
from pgps_jax.errors import InputError
from pgps_jax.main import EXIT_BAD_INPUT, main
from pgps_jax.preparation import raw_folder


@pytest.fixture
def decathlon(tmp_path):
    """Task07_Tiny, as the Decathlon's archives unpack."""
    made = write_phantom_dataset(tmp_path / "made", num_cases=5, num_test=1, shape=(12, 12, 12))
    folder = tmp_path / "Task07_Tiny"
    (folder / "imagesTr").mkdir(parents=True)
    (made / "labelsTr").rename(folder / "labelsTr")
    cases = sorted(path.name for path in (folder / "labelsTr").iterdir())
    for case in cases:
        (made / "imagesTr" / case.replace(".nii", "_0000.nii")).rename(folder / "imagesTr" / case)
    labels = json.loads((made / "dataset.json").read_text())["labels"]
    (folder / "dataset.json").write_text(json.dumps({
        "modality": {"0": "MRI"}, "labels": {str(value): name for name, value in labels.items()},
        "training": [{"image": f"./imagesTr/{case}", "label": f"./labelsTr/{case}"} for case in cases]}))
    return folder


def test_a_decathlon_folder_is_converted_into_the_workspace_once(decathlon, tmp_path):
    said = []
    folder = raw_folder(decathlon, tmp_path / "work", said.append)
    assert folder == tmp_path / "work" / "raw" / "Dataset007_Tiny" and len(said) == 1
    image = next((decathlon / "imagesTr").iterdir())
    converted = folder / "imagesTr" / image.name.replace(".nii", "_0000.nii")
    np.testing.assert_array_equal(nibabel.load(image).dataobj, nibabel.load(converted).dataobj)
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert raw_folder(decathlon, tmp_path / "work", said.append) == folder and len(said) == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written
    assert raw_folder(folder, tmp_path / "work", said.append) == folder, "nnU-Net's layout is taken as it is"


def test_commands_take_a_decathlon_folder_and_work_under_its_converted_name(decathlon, tmp_path, capsys):
    assert main(["preprocess", str(decathlon), "--workspace", str(tmp_path / "work"), "--workers", "1"]) == 0
    preprocessed = tmp_path / "work" / "preprocessed" / "Dataset007_Tiny"
    assert len(list((preprocessed / "gt_segmentations").iterdir())) == 5
    assert json.loads((preprocessed / "nnUNetPlans.json").read_text())["dataset_name"] == "Dataset007_Tiny"
    capsys.readouterr()
    shown = ["schedule", str(decathlon), "--workspace", str(tmp_path / "work"), "--epochs", "2", "--steps-per-epoch", "4", "--json"]
    assert main(shown) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 8


def test_a_task_that_is_not_there_is_told_how_to_get(tmp_path):
    with pytest.raises(InputError, match="`fetch-msd Task09_Spleen -o"):
        raw_folder(tmp_path / "Task09_Spleen", tmp_path / "work", print)


def test_fetch_msd_hands_the_task_on_and_says_what_is_wrong_with_it(tmp_path, monkeypatch, capsys):
    assert main(["fetch-msd", "Task99_Nothing", "-o", str(tmp_path)]) == EXIT_BAD_INPUT
    assert "Task04_Hippocampus" in "".join(capsys.readouterr())
    monkeypatch.setattr(program, "fetch_msd", lambda task, folder, progress: folder / task)
    assert main(["fetch-msd", "Task04_Hippocampus", "-o", str(tmp_path)]) == 0
    assert str(tmp_path / "Task04_Hippocampus") in capsys.readouterr().out
