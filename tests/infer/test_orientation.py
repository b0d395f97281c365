"""From the training images to `predict`: the orientation is stored with a run, and other images are turned to it."""

import json
from pathlib import Path

import numpy as np
import pytest

from pgps_jax.data.nifti import read_volume, reorient, write_volume
from pgps_jax.data.plan import Plan
from pgps_jax.data.store import CaseStore, StoredCase
from pgps_jax.errors import InputError
from pgps_jax.exchange import export_nnunet
from pgps_jax.infer.predict import find_cases
from pgps_jax.interop.pickles import read_checkpoint
from pgps_jax.main import main
from pgps_jax.validate import load_predictor
from pgps_jax.workspace import common_left_right_axis, training_orientation

LPS, RAS, RAI = np.diag([-1.0, -1, 1, 1]), np.eye(4), np.diag([1.0, 1, -1, 1])


def store(*affines):
    """A store of cases that know nothing but their geometry."""
    stuff = [affine if isinstance(affine, dict) else {"original_affine": affine.tolist()} for affine in affines]

    class Cases(CaseStore):
        def open(self, case_id):
            return StoredCase(case_id, None, None, {"nibabel_stuff": stuff[int(case_id)]}, {})

    return Cases(Path())


@pytest.mark.parametrize("affines, expected", [
    ([RAS, LPS, LPS], "LPS"), ([RAI], "RAI"), ([RAS] * 150 + [LPS] * 200, "LPS"), ([np.diag([0.0, 1, 1, 1])], None),
    ([{"original_affine": LPS.tolist(), "reoriented_affine": RAS.tolist()}], "RAS"),
])  # fmt: skip
def test_a_run_keeps_the_orientation_of_most_of_its_training_images(affines, expected):
    assert training_orientation(store(*affines), [str(i) for i in range(len(affines))]) == expected


def test_the_left_right_axis_is_that_of_all_images_as_they_were_preprocessed(small_plans):
    plan, sagittal = Plan.from_json(small_plans), np.array([[0.0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    assert common_left_right_axis(store(RAS, LPS), ["0", "1"], plan) == 2
    turned = {"original_affine": sagittal.tolist(), "reoriented_affine": RAS.tolist()}
    assert common_left_right_axis(store(turned, LPS), ["0", "1"], plan) == 2
    with pytest.raises(InputError, match="axis 2 in case 0, along axis 0 in case 2"):
        common_left_right_axis(store(RAS, LPS, sagittal), ["0", "1", "2"], plan)


def store_inference(folder, **more):
    (folder / "inference.json").write_text(json.dumps({"configuration": "3d_fullres", "mirror_axes": [], **more}))


def test_predict_turns_images_to_the_trainings_orientation_and_segmentations_back_or_warns(run, tmp_path, capsys):
    image = np.random.default_rng(1).normal(1, 1, (9, 11, 10)).astype(np.float32)
    (tmp_path / "in").mkdir()
    turned = {"same": (image, LPS)} | {codes: reorient(image, LPS, codes) for codes in ("RAI", "SLP")}
    for name, (array, affine) in turned.items():
        write_volume(tmp_path / "in" / f"{name}_0000.nii.gz", array, affine)
    assert [case.id for case in find_cases(tmp_path / "in", ["MRI"], ".nii.gz")] == ["RAI", "SLP", "same"]

    def predicted(output, *flags):
        assert main(["predict", str(run), "-i", str(tmp_path / "in"), "-o", str(tmp_path / output), *flags]) == 0
        volumes = {name: read_volume(tmp_path / output / f"{name}.nii.gz") for name in turned}
        for name, (array, affine) in turned.items():
            assert volumes[name].array.shape == array.shape
            np.testing.assert_allclose(volumes[name].affine, affine, atol=1e-5)
        return volumes["same"].array, [reorient(volumes[c].array, volumes[c].affine, "LPS")[0] for c in ("RAI", "SLP")]

    same, others = predicted("turned")
    assert len(np.unique(same)) > 1
    for other in others:
        np.testing.assert_array_equal(other, same)
    assert "1 RAI, 1 SLP images are turned to LPS" in capsys.readouterr().out

    same_again, others = predicted("ignored", "--ignore-orientation")
    np.testing.assert_array_equal(same_again, same)
    assert all((other != same).any() for other in others), "this network should tell the sides apart"
    captured = capsys.readouterr()
    assert "warning: 1 RAI, 1 SLP images are not stored as LPS" in captured.out + captured.err


def test_runs_that_do_not_know_their_orientation_take_images_as_they_are(run):
    assert load_predictor(run).orientation == "LPS"
    store_inference(run)
    assert load_predictor(run).orientation is None


def test_a_run_trained_with_swapped_labels_swaps_them_back_when_it_predicts_mirrored_copies(run, tmp_path):
    image = np.random.default_rng(1).normal(1, 1, (1, 8, 8, 8)).astype(np.float32)  # a single tile: weights do not matter

    def logits(image, **inference):
        store_inference(run, mirror_axes=[2], **inference)
        predictor = load_predictor(run)
        return predictor.window(predictor.fold_params, image)

    swap = {"swap_axis": 2, "swap_pairs": [[1, 2]]}
    mirrored = np.flip(logits(np.flip(image, 3), **swap), 3)[[0, 2, 1]]
    np.testing.assert_allclose(mirrored, logits(image, **swap), rtol=1e-4, atol=1e-4)
    assert np.abs(logits(image, **swap) - logits(image)).max() > 0.01

    store_inference(run, mirror_axes=[0, 1, 2], **swap)
    export_nnunet(run, tmp_path / "nnunet")
    (checkpoint,) = (tmp_path / "nnunet").glob("fold_*/checkpoint_final.pth")
    assert list(read_checkpoint(checkpoint)["inference_allowed_mirroring_axes"]) == [0, 1], "nnU-Net cannot exchange labels"
