"""A model that nnU-Net trained, run here: its logits and its segmentations (real data; skipped where absent)."""

import json

import numpy as np
import pytest

from pgps_jax.data.dataset import Labels, RawCase
from pgps_jax.data.nifti import read_volume
from pgps_jax.data.plan import read_plan
from pgps_jax.infer.predict import make_predictor
from pgps_jax.interop.nnunet_names import params_from_state_dict
from pgps_jax.interop.pickles import read_checkpoint

LOGIT_TOLERANCE = 2e-3  # of the parity kit; we reach about 1e-5
CASES = ["hippocampus_035", "hippocampus_095", "hippocampus_243", "hippocampus_263"]


@pytest.fixture(scope="module")
def folder(real_parity):
    return real_parity / "inference" / "Dataset004_Hippocampus"


@pytest.fixture(scope="module")
def predictors(folder):
    plan = read_plan(folder / "model" / "plans.json")
    labels = Labels.from_json(json.loads((folder / "model" / "dataset.json").read_text()))
    weights = read_checkpoint(folder / "model" / "fold_0" / "checkpoint_final.pth")["network_weights"]
    params = params_from_state_dict(weights)
    return {
        mirror: make_predictor(plan, plan.configurations["3d_fullres"], labels, ("MRI",), [params], mirror=mirror)
        for mirror in (True, False)
    }


@pytest.mark.parametrize("mirror", [True, False])
def test_logits_equal_nnunets_tiles_added_in_float64(folder, predictors, mirror):
    arrays = np.load(folder / "sliding_window_logits.npz")
    predictor = predictors[mirror]
    logits = predictor.window(predictor.fold_params, arrays["preprocessed"])
    expected = arrays["logits_with_mirroring" if mirror else "logits_without_mirroring"]
    np.testing.assert_allclose(logits, expected, atol=LOGIT_TOLERANCE)


def test_logits_of_many_tiles_equal_nnunets(folder, predictors):
    image = np.load(folder / "sliding_window_logits.npz")["preprocessed"]
    expected = np.load(folder / "sliding_window_many_tiles.npz")
    predictor = predictors[False]
    logits = predictor.window(predictor.fold_params, np.tile(image, (1, 1, 2, 2)))
    np.testing.assert_allclose(
        logits[:, :, ::2, ::2], expected["logits_without_mirroring_stride2"], atol=LOGIT_TOLERANCE)
    assert (logits.argmax(0) == expected["segmentation"]).mean() >= 0.9999


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_segmentations_equal_nnunets(folder, real_data, predictors, case, mirror):
    image = read_volume(real_data / "Hippocampus" / "imagesTr" / f"{case}_0000.nii.gz")
    kind = "with_mirroring" if mirror else "without_mirroring"
    peer = read_volume(folder / kind / f"{case}.nii.gz").array
    ours = predictors[mirror].predict_case([image])
    assert (ours == peer).mean() >= 0.999
    for label in (1, 2):
        a, b = ours == label, peer == label
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) >= 0.995


@pytest.mark.parametrize("case", CASES[:1])
def test_probabilities_equal_nnunets(folder, real_data, predictors, case):
    image = read_volume(real_data / "Hippocampus" / "imagesTr" / f"{case}_0000.nii.gz")
    predictor = predictors[True]
    prepared = predictor.preprocess(RawCase(image.array[None], None, image.spacing, image.affine))
    ours = predictor.probabilities(predictor.logits(prepared), prepared)
    stored = np.load(folder / "with_mirroring" / f"{case}_probabilities.npz")["probabilities"].astype(np.float32)
    assert np.percentile(np.abs(ours - stored), 99.9) < 5e-3  # nnU-Net adds logits up in float16: worse at corners
