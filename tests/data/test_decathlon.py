"""A Decathlon folder becomes an nnU-Net dataset with the same voxels."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from pgps_jax.data import decathlon
from pgps_jax.data.dataset import check_dataset, open_dataset, read_case
from pgps_jax.data.decathlon import convert_decathlon, converted_name, is_decathlon
from pgps_jax.data.nifti import write_volume
from pgps_jax.errors import InputError

AFFINE = np.array([[-1.0, 0, 0, 5], [0, 2, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]])


def write_decathlon(folder: Path, channels: int = 2, **changes) -> Path:
    """Two labelled cases and one without a label; images 4D (x, y, z, channel), or 3D for one channel."""
    rng = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir(parents=True)
    for case in ("imagesTr/a", "imagesTr/b", "imagesTs/c"):
        data = rng.integers(-100, 100, (4, 5, 6, channels)[: 3 + (channels > 1)]).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(data, AFFINE), folder / f"{case}.nii.gz")
        write_volume(folder / f"labelsTr/{case[-1]}.nii.gz", rng.integers(0, 3, (6, 5, 4)), AFFINE)
    content = {
        "name": "Brains", "tensorImageSize": "4D", "modality": {str(i): f"channel {i}" for i in range(channels)},
        "labels": {"0": "Background", "2": "core", "1": "edema"}, "numTraining": 99, "numTest": 1,
        "training": [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in "ba"],
        "test": ["./imagesTs/c.nii.gz"],
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(content | changes))
    return folder


@pytest.mark.parametrize("channels", [1, 2])
def test_the_converted_dataset_has_the_same_voxels_and_geometry(tmp_path, channels):
    source = write_decathlon(tmp_path / "Task04_Brains", channels)
    seen = []
    output = convert_decathlon(source, tmp_path / "out" / converted_name(source.name), lambda *done: seen.append(done))
    assert output.name == "Dataset004_Brains" and seen[-1] == (3, 3)
    dataset = open_dataset(output)
    check_dataset(dataset)
    assert [case.id for case in dataset.cases] == ["a", "b"]
    assert dataset.channel_names == tuple(f"channel {i}" for i in range(channels))
    assert dataset.labels.names == ("background", "core", "edema") and dataset.labels.values == (0, 2, 1)
    assert dataset.json["tensorImageSize"] == "4D" and not {"modality", "training", "test"} & set(dataset.json)
    for case in dataset.cases:
        original = nibabel.load(source / f"imagesTr/{case.id}.nii.gz")
        raw = read_case(case, dataset.labels)
        np.testing.assert_array_equal(raw.image, np.asarray(original.dataobj).reshape(4, 5, 6, channels).T)
        np.testing.assert_allclose(raw.affine, original.affine)
        assert raw.spacing == (3.0, 2.0, 1.0)
        assert (output / f"labelsTr/{case.id}.nii.gz").read_bytes() == (source / f"labelsTr/{case.id}.nii.gz").read_bytes()
    assert sorted(path.name for path in (output / "imagesTs").iterdir()) == [f"c_{i:04d}.nii.gz" for i in range(channels)]


def test_an_interrupted_conversion_goes_on_and_a_finished_one_is_left_alone(tmp_path, monkeypatch):
    source, output = write_decathlon(tmp_path / "Task01_X"), tmp_path / "X"
    write = decathlon.write_volume
    monkeypatch.setattr(decathlon, "write_volume", lambda path, *rest: 1 / 0 if path.name.startswith("a") else write(path, *rest))
    with pytest.raises(ZeroDivisionError):
        convert_decathlon(source, output, workers=1)
    assert not (output / "dataset.json").exists() and (output / "imagesTr/b_0001.nii.gz").exists()
    monkeypatch.undo()
    before = (output / "imagesTr/b_0001.nii.gz").stat().st_mtime_ns
    check_dataset(open_dataset(convert_decathlon(source, output)))
    assert (output / "imagesTr/b_0001.nii.gz").stat().st_mtime_ns == before
    monkeypatch.setattr(decathlon, "write_volume", lambda *rest: 1 / 0)
    assert convert_decathlon(source, output) == output


def test_opening_a_decathlon_folder_says_what_to_do(tmp_path):
    source = write_decathlon(tmp_path / "Task01_X")
    assert is_decathlon(source) and not is_decathlon(tmp_path)
    with pytest.raises(InputError, match=r"Decathlon.*convert-msd"):
        open_dataset(source)
    assert not is_decathlon(convert_decathlon(source, tmp_path / "X"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modality": {"0": "MRI"}}, r"[abc]\.nii\.gz has 2 channels"),
        ({"modality": None}, '"modality"'),
        ({"labels": {"background": 0}}, '"labels"'),
        ({"labels": {"0": "background", "1": "a", "2": "a"}}, "same name"),
        ({"labels": {"1": "a"}}, "background"),
        ({"training": []}, '"training"'),
        ({"training": ["./imagesTr/a.nii.gz"]}, '"training"'),
        ({"training": [{"image": "imagesTr/z.nii.gz", "label": "labelsTr/a.nii.gz"}]}, r"z\.nii\.gz' is missing"),
        ({"training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}] * 2}, "a is listed twice"),
    ],
)
def test_faulty_decathlon_folders_are_refused_and_nothing_looks_finished(tmp_path, changes, words):
    source = write_decathlon(tmp_path / "Task01_X", **changes)
    with pytest.raises(InputError, match=words):
        convert_decathlon(source, tmp_path / "X")
    assert not (tmp_path / "X" / "dataset.json").exists()


def test_another_dataset_is_not_overwritten(tmp_path):
    convert_decathlon(write_decathlon(tmp_path / "Task01_X"), tmp_path / "out")
    with pytest.raises(InputError, match="holds another dataset"):
        convert_decathlon(write_decathlon(tmp_path / "Task02_Y", name="Other"), tmp_path / "out")
    with pytest.raises(InputError, match="no Decathlon folder"):
        convert_decathlon(tmp_path / "out", tmp_path / "again")


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    source = write_decathlon(tmp_path / "Task01_X")
    monkeypatch.setattr(decathlon.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(InputError, match="needs about"):
        convert_decathlon(source, tmp_path / "X")
    assert not (tmp_path / "X").exists()
