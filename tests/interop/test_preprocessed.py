"""A preprocessed folder of ours, exported, is one of nnU-Net's."""

import os
import pickle

import numpy as np
import pytest

from pgps_jax.data.store import CaseStore, Preprocessed, write_case
from pgps_jax.errors import InputError
from pgps_jax.interop.pickles import read_properties
from pgps_jax.interop.preprocessed import export_properties
from pgps_jax.main import main

AFFINE = np.array([[0, -0.5, 0, 10], [0.7, 0, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]], np.float64)


@pytest.fixture
def folder(tmp_path):
    tmp_path = tmp_path / "nnUNetPlans_3d_fullres"
    tmp_path.mkdir()
    rng = np.random.default_rng(0)
    for name in ("case_a", "case_b"):
        image = rng.normal(size=(2, 9, 20, 15)).astype(np.float32)
        seg = rng.integers(-1, 3, (1, 9, 20, 15)).astype(np.int16)
        properties = {
            "spacing": [3.0, 0.5, 0.7],
            "shape_before_cropping": [10, 22, 16],
            "bbox_used_for_cropping": [[0, 9], [1, 21], [1, 16]],
            "shape_after_cropping_and_before_resampling": [9, 20, 15],
            "nibabel_stuff": {"original_affine": AFFINE.tolist()},
        }
        locations = {1: np.argwhere(seg[0] == 1), (1, 2): np.argwhere(seg[0] > 0), 5: np.zeros((0, 3), int)}
        write_case(tmp_path, name, Preprocessed(image, seg, properties, locations), (8, 16, 16))
    return tmp_path


def test_exported_properties_say_the_same_as_ours(folder):
    seen = []
    export_properties(folder, lambda *counts: seen.append(counts))
    assert seen == [(1, 2), (2, 2)]
    ours = CaseStore(folder).open("case_a")
    for theirs in (read_properties(folder / "case_a.pkl"), pickle.loads((folder / "case_a.pkl").read_bytes())):
        assert theirs["spacing"] == ours.properties["spacing"]
        assert theirs["shape_before_cropping"] == (10, 22, 16)
        np.testing.assert_array_equal(theirs["nibabel_stuff"]["original_affine"], AFFINE)
        np.testing.assert_array_equal(theirs["class_locations"][(1, 2)][:, 1:], ours.locations[(1, 2)])
        assert not theirs["class_locations"][1][:, 0].any() and theirs["class_locations"][5] == []


def test_without_our_json_the_export_is_read_as_nnunets_with_the_same_geometry(folder):
    export_properties(folder)
    before = CaseStore(folder).open("case_b")
    (folder / "properties" / "case_b.json").unlink()
    after = CaseStore(folder).open("case_b")
    np.testing.assert_array_equal(after.locations[1], before.locations[1])
    pickled = read_properties(folder / "case_b.pkl")
    del pickled["nibabel_stuff"]  # as if SimpleITK had been nnU-Net's reader
    (folder / "case_b.pkl").write_bytes(pickle.dumps(pickled))
    affine = CaseStore(folder).open("case_b").properties["nibabel_stuff"]["original_affine"]
    np.testing.assert_allclose(affine, AFFINE, atol=1e-12)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no preprocessed folder"):
        export_properties(tmp_path / "nowhere")


def test_the_command_writes_what_nnunet_needs_and_names_the_folder_that_is_meant(folder, capsys):
    assert main(["export-preprocessed", str(folder)]) == 0
    assert len(list(folder.glob("*.pkl"))) == 2
    assert main(["export-preprocessed", str(folder.parent)]) == 2
    assert f"name one of the folders in it: {folder.name}" in capsys.readouterr().err


def test_nnunets_own_dataset_class_opens_the_folder(folder, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, os.fspath(folder))
    peer = pytest.importorskip("nnunetv2.training.dataloading.nnunet_dataset", reason="nnunetv2 is not installed")
    export_properties(folder)
    dataset_class = peer.infer_dataset_class(str(folder))
    assert dataset_class is peer.nnUNetDatasetBlosc2
    dataset = dataset_class(str(folder))
    assert sorted(dataset.identifiers) == ["case_a", "case_b"]
    for name in dataset.identifiers:
        image, seg, _, properties = dataset.load_case(name)
        ours = CaseStore(folder).open(name)
        np.testing.assert_array_equal(image[:], ours.image[:])
        np.testing.assert_array_equal(seg[:, 2:5, 3:9], ours.seg[:, 2:5, 3:9])
        assert set(properties["class_locations"]) == {1, (1, 2), 5}
        np.testing.assert_array_equal(properties["class_locations"][1][:, 1:], ours.locations[1])
