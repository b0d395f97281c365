"""Cropping, normalisation and resampling against nnU-Net's numbers and against plain implementations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pgps_jax.data.resample import (
    coarse_axis,
    crop_to_nonzero,
    normalise,
    resample_image,
    resample_segmentation,
    resampled_shape,
)
from pgps_jax.errors import InputError

ISOTROPIC = (1.0, 1.0, 1.0)
RESAMPLED = [
    "isotropic_down", "isotropic_up", "same_shape", "separate_z_axis2", "separate_z_current", "separate_z_new",
    "two_coarse_axes",
]  # fmt: skip


@pytest.mark.parametrize("name", RESAMPLED)
def test_resampling_equals_nnunet(golden, name):
    arrays, sidecar = golden(f"preprocess/resample_{name}")
    spacing, new_spacing = tuple(sidecar["current_spacing"]), tuple(sidecar["new_spacing"])
    shape = tuple(sidecar["new_shape"])
    assert coarse_axis(spacing, new_spacing) == sidecar["separate_z_axis"]
    assert resampled_shape(arrays["data_in"].shape[1:], spacing, new_spacing) == shape
    for order in (3, 1):
        image = resample_image(arrays["data_in"], shape, spacing, new_spacing, order)
        np.testing.assert_allclose(image, arrays[f"data_order{order}"], atol=1e-5)
    for order in (1, 0):
        seg = resample_segmentation(arrays["seg_in"], shape, spacing, new_spacing, order)
        np.testing.assert_array_equal(seg, arrays[f"seg_order{order}"])


def test_cropping_equals_nnunet(golden):
    arrays, sidecar = golden("preprocess/crop_to_nonzero")
    image, seg, box = crop_to_nonzero(arrays["data_in"], arrays["seg_in"].astype(np.int16))
    np.testing.assert_array_equal(image, arrays["data_out"])
    np.testing.assert_array_equal(seg, arrays["seg_out"])
    assert [list(side) for side in box] == sidecar["bbox"]
    _, without_labels, _ = crop_to_nonzero(arrays["data_in"])
    np.testing.assert_array_equal(without_labels, arrays["seg_out_without_labels"])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 0.95))
def test_what_is_outside_is_what_hole_filling_leaves(seed, share):
    mask = np.random.default_rng(seed).random((7, 8, 9)) < share
    image = mask[None].astype(np.float32)
    _, seg, box = crop_to_nonzero(image)
    filled = ndimage.binary_fill_holes(mask)
    inside = tuple(slice(low, high) for low, high in box)
    np.testing.assert_array_equal(seg[0] == 0, filled[inside] if mask.any() else np.zeros(mask.shape, bool))
    assert not np.delete(filled, np.s_[box[0][0] : box[0][1]], axis=0).any()  # nothing of the body is cut away


def test_an_image_of_zeros_is_kept_whole():
    image, seg, box = crop_to_nonzero(np.zeros((1, 4, 5, 6), np.float32))
    assert image.shape == (1, 4, 5, 6) and box == ((0, 4), (0, 5), (0, 6)) and (seg == -1).all()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    new_shape=st.tuples(*[st.integers(1, 15)] * 3),
    order=st.sampled_from([1, 3]),
)
def test_separable_resampling_equals_scipy_zoom(seed, shape, new_shape, order):
    x = np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)
    zoom = [new / old for new, old in zip(new_shape, shape, strict=True)]
    plain = ndimage.zoom(x[0].astype(np.float64), zoom, order=order, mode="nearest", grid_mode=True)
    ours = resample_image(x, new_shape, ISOTROPIC, ISOTROPIC, order)[0]
    np.testing.assert_allclose(ours, plain.clip(x.min(), x.max()), atol=2e-5)


def test_long_axes_are_resampled_in_blocks_without_seams():
    x = np.random.default_rng(0).normal(size=(1, 3, 300, 4)).astype(np.float32)
    plain = ndimage.zoom(x[0].astype(np.float64), (1, 333 / 300, 1), order=3, mode="nearest", grid_mode=True)
    ours = resample_image(x, (3, 333, 4), ISOTROPIC, ISOTROPIC)[0]
    np.testing.assert_allclose(ours, plain.clip(x.min(), x.max()), atol=2e-5)


def one_label_at_a_time(seg: np.ndarray, new_shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The definition: zoom every label's indicator, take the largest, ties to the nearest voxel, else the lowest.

    Also tells where two labels' largest shares are equal but for the last digits of a float64, so that rounding decides.
    """
    zoom = [new / old for new, old in zip(new_shape, seg.shape, strict=True)]

    def resize(x, order):
        return ndimage.zoom(x, zoom, order=order, mode="nearest", grid_mode=True)

    labels = np.unique(seg)
    scores = np.stack([resize((seg == label).astype(np.float64), 1) for label in labels])
    nearest = resize(seg, 0)
    tied = scores == scores.max(0)
    nearest_tied = np.take_along_axis(tied, np.searchsorted(labels, nearest)[None], 0)[0]
    return np.where(nearest_tied, nearest, labels[tied.argmax(0)]), (scores >= scores.max(0) - 1e-12).sum(0) > 1


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(*[st.integers(2, 9)] * 3),
    new_shape=st.tuples(*[st.integers(1, 14)] * 3),
)
def test_labels_are_interpolated_as_if_one_at_a_time(seed, shape, new_shape):
    seg = np.random.default_rng(seed).integers(-1, 6, (1, *shape)).astype(np.int16)
    ours = resample_segmentation(seg, new_shape, ISOTROPIC, ISOTROPIC)[0]
    plain, tied = one_label_at_a_time(seg[0], new_shape)
    np.testing.assert_array_equal(ours[~tied], plain[~tied])


def test_ties_between_labels_go_to_the_nearest_voxel_or_the_lowest_label():
    seg = np.random.default_rng(0).integers(-1, 2, (1, 8, 8, 8)).astype(np.int16)
    new_shape = (16, 16, 16)  # weights are products of quarters: nothing is rounded
    plain, tied = one_label_at_a_time(seg[0], new_shape)
    assert tied.any()
    np.testing.assert_array_equal(resample_segmentation(seg, new_shape, ISOTROPIC, ISOTROPIC)[0], plain)


@pytest.mark.parametrize("factor", [2, 3])
def test_a_label_map_enlarged_by_a_whole_factor_shrinks_back_to_itself(factor):
    seg = np.random.default_rng(factor).integers(0, 9, (1, 6, 5, 7)).astype(np.int16)
    enlarged = seg.repeat(factor, 1).repeat(factor, 2).repeat(factor, 3)
    np.testing.assert_array_equal(resample_segmentation(enlarged, (6, 5, 7), ISOTROPIC, ISOTROPIC), seg)


def test_slices_of_a_coarse_axis_never_mix():
    image = np.zeros((1, 4, 10, 10), np.float32)
    image[0, 2] = 1
    out = resample_image(image, (6, 5, 5), (5.0, 1.0, 1.0), (3.3, 2.0, 2.0))
    assert set(np.unique(out)) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("spacing", "new_spacing", "axis"),
    [
        ((5.0, 1.0, 1.0), (4.0, 1.0, 1.0), 0),
        ((3.0, 1.0, 1.0), (1.0, 1.0, 1.0), None),  # a ratio of exactly 3 is not more than 3
        ((1.0, 1.0, 1.0), (1.0, 1.0, 3.5), 2),
        ((4.0, 4.0, 1.0), (1.0, 1.0, 9.0), None),  # two coarse axes: the current spacing has decided
    ],
)
def test_the_coarse_axis_is_nnunets(spacing, new_spacing, axis):
    assert coarse_axis(spacing, new_spacing) == axis


def test_halves_round_to_even():
    assert resampled_shape((5, 7, 3), (0.5, 0.5, 0.5), ISOTROPIC) == (2, 4, 2)


def test_each_normalisation_does_what_it_says():
    image = np.random.default_rng(0).uniform(0, 200, (5, 6, 7, 8)).astype(np.float32)
    before = image.copy()
    seg = np.zeros((1, 6, 7, 8), np.int16)
    seg[0, :3] = -1
    ct = {"4": {"percentile_00_5": 50.0, "percentile_99_5": 150.0, "mean": 90.0, "std": 20.0}}
    schemes = [f"{s}Normalization" for s in ("ZScore", "ZScore", "RescaleTo01", "RGBTo01", "CT")]
    z, masked, unit, rgb, hounsfield = normalise(image, seg, tuple(schemes), (False, True, False, False, False), ct)
    np.testing.assert_array_equal(image, before)
    assert abs(z.mean()) < 1e-5 and abs(z.std() - 1) < 1e-5
    assert abs(masked[3:].mean()) < 1e-5 and abs(masked[3:].std() - 1) < 1e-5
    np.testing.assert_array_equal(masked[:3], image[1, :3])
    assert unit.min() == 0 and unit.max() == 1
    np.testing.assert_allclose(rgb, image[3] / 255)
    np.testing.assert_allclose(hounsfield, (image[4].clip(50, 150) - 90) / 20, rtol=1e-5, atol=1e-6)


def test_a_constant_image_normalises_to_zero_and_bad_requests_are_refused():
    flat = np.full((1, 2, 3, 4), 300, np.float32)
    seg = np.zeros((1, 2, 3, 4), np.int16)
    assert not normalise(flat, seg, ("ZScoreNormalization",), (False,), {}).any()
    with pytest.raises(InputError, match=r"0\.\.255"):
        normalise(flat, seg, ("RGBTo01Normalization",), (False,), {})
    with pytest.raises(InputError, match="Other"):
        normalise(flat, seg, ("OtherNormalization",), (False,), {})
