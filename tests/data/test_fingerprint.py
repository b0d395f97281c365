"""The fingerprint is what nnU-Net's random draws tend to, and bounded in memory."""

import json

import numpy as np
import pytest

from pgps_jax.data.dataset import open_dataset
from pgps_jax.data.fingerprint import Fingerprint, condense, extract_fingerprint, pooled_statistics
from pgps_jax.data.nifti import write_volume
from pgps_jax.errors import InputError

REAL = {"Hippocampus": "Dataset004_Hippocampus", "SarcomaPETCT": "Dataset101_SarcomaPETCT", "SunnybrookCMR": "Dataset102_Sunnybrook"}


def drawn(cases: list[np.ndarray], n: int) -> dict[str, float]:
    """nnU-Net's rule: the same number of values from each case, with replacement."""
    values = np.concatenate([np.random.RandomState(1234).choice(case, n, replace=True) for case in cases])
    low, median, high = np.percentile(values, (0.5, 50, 99.5))
    return {"mean": values.mean(), "std": values.std(), "median": median, "percentile_00_5": low, "percentile_99_5": high,
            "min": values.min(), "max": values.max()}


def test_every_case_weighs_the_same_as_if_equally_many_voxels_were_drawn():
    rng = np.random.default_rng(0)
    cases = [rng.normal(mean, std, n).astype(np.float32) for mean, std, n in ((100, 5, 400), (300, 40, 30_000), (50, 2, 3000))]
    found = pooled_statistics([condense(case, 10**6) for case in cases], "CT")
    for key, value in drawn(cases, 2_000_000).items():
        assert found[key] == pytest.approx(value, rel=2e-3), key


def test_thinning_large_cases_moves_no_percentile_by_more_than_its_rank_step():
    values = np.random.default_rng(0).gamma(2, 100, 500_000).astype(np.float32)
    whole, thin = condense(values, 10**6), condense(values, 2000)
    assert len(whole.ranked) == 500_000 and len(thin.ranked) == 2000
    assert (thin.count, thin.mean, thin.std, thin.low, thin.high) == (whole.count, whole.mean, whole.std, whole.low, whole.high)
    exact, found = pooled_statistics([whole], "x"), pooled_statistics([thin], "x")
    for key, share in (("percentile_00_5", 0.005), ("median", 0.5), ("percentile_99_5", 0.995)):
        assert np.quantile(values, share - 1e-3) <= found[key] <= np.quantile(values, share + 1e-3)
        assert found[key] == pytest.approx(exact[key], rel=0.03)


def test_a_case_without_foreground_does_not_count():
    case = condense(np.array([1, 2, 3], np.float32), 10)
    assert pooled_statistics([case, condense(np.empty(0, np.float32), 10)], "x") == pooled_statistics([case], "x")
    with pytest.raises(InputError, match="channel PET: no case has a labelled voxel"):
        pooled_statistics([condense(np.empty(0, np.float32), 10)], "PET")


@pytest.fixture
def folder(tmp_path):
    """Two cases of one channel, zero but for a box; label 1 in its corner, one label voxel outside the box."""
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).mkdir()
    for case, side in (("a", 3), ("b", 4)):
        image, label = np.zeros((6, 6, 6), np.float32), np.zeros((6, 6, 6), np.uint8)
        image[1 : 1 + side, 2:5, 2:5] = 7 + np.arange(9).reshape(3, 3)
        label[1, 2, 2:4] = 1
        label[0, 0, 0] = 1
        write_volume(tmp_path / f"imagesTr/{case}_0000.nii.gz", image, np.diag([1, 2, 3, 1.0]))
        write_volume(tmp_path / f"labelsTr/{case}.nii.gz", label, np.diag([1, 2, 3, 1.0]))
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "x": 1}, "numTraining": 2, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    return tmp_path


def test_shapes_and_intensities_are_those_inside_the_crop(folder):
    seen = []
    found = extract_fingerprint(open_dataset(folder), progress=lambda done, total: seen.append((done, total)))
    assert found.shapes_after_crop == ((3, 3, 3), (4, 3, 3)) and found.spacings == ((3.0, 2.0, 1.0),) * 2
    assert found.median_relative_size_after_cropping == pytest.approx((27 + 36) / 2 / 216)
    assert found.intensity_properties["0"] == pytest.approx(
        {"max": 8, "mean": 7.5, "median": 7, "min": 7, "percentile_00_5": 7, "percentile_99_5": 8, "std": 0.5})
    assert seen == [(1, 2), (2, 2)]
    assert Fingerprint.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_values_that_are_not_finite_are_refused(folder):
    write_volume(folder / "imagesTr/b_0000.nii.gz", np.full((6, 6, 6), np.inf, np.float32), np.diag([1, 2, 3, 1.0]))
    with pytest.raises(InputError, match=r"case b: .*not finite"):
        extract_fingerprint(open_dataset(folder))


def test_a_fingerprint_without_a_key_is_refused():
    with pytest.raises(InputError, match="'spacings'"):
        Fingerprint.from_json({})


@pytest.mark.parametrize("name", REAL)
def test_real_fingerprints_agree_with_nnunets_to_a_thousandth(real_data, real_parity, name):
    want = json.loads((real_parity / "plans" / REAL[name] / "dataset_fingerprint.json").read_text())
    found = extract_fingerprint(open_dataset(real_data / name)).to_json()
    assert found.keys() == want.keys() and found["shapes_after_crop"] == want["shapes_after_crop"]
    np.testing.assert_allclose(found["spacings"], want["spacings"], rtol=1e-6)
    assert found["median_relative_size_after_cropping"] == pytest.approx(want["median_relative_size_after_cropping"], rel=1e-6)
    for channel, properties in want["foreground_intensity_properties_per_channel"].items():
        assert found["foreground_intensity_properties_per_channel"][channel] == pytest.approx(properties, rel=1e-3)
