"""Every transform equals nnU-Net's, the draws follow its distributions, and batches can be made again."""

import dataclasses
import doctest
import math
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgps_jax.data.labels import Labels
from pgps_jax.errors import InputError
from pgps_jax.train import augment as augment_module
from pgps_jax.train import intensity, spatial
from pgps_jax.train.augment import (
    AugmentConfig,
    augment,
    crop_size,
    draw_parameters,
    make_policy,
)

PATCH = (12, 16, 14)
DEFAULT = dataclasses.replace(make_policy(AugmentConfig(), PATCH), p_noise=1.0)  # noise shows every random key
ONLY_MIRROR = make_policy(AugmentConfig("light"), PATCH)
ONLY_MIRROR = dataclasses.replace(
    ONLY_MIRROR, p_noise=0.0, p_brightness=0.0, p_contrast=0.0, p_gamma_inverted=0.0, p_gamma=0.0
)
run = jax.jit(augment, static_argnums=(3, 4))


def batch(policy, patch=PATCH, size=6, channels=2, dtype=np.float32):
    rng = np.random.default_rng(0)
    shape = (size, *crop_size(policy, patch))
    return jnp.asarray(rng.normal(size=(*shape, channels)), dtype), jnp.asarray(rng.integers(-1, 3, shape), jnp.int8)


def close(ours, theirs) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * max(np.ptp(theirs), 1e-6))


def test_the_docstring_example_runs():
    results = doctest.testmod(augment_module)
    assert results.attempted > 0
    assert results.failed == 0


# Equality with nnU-Net's transforms, fixed parameters


@pytest.mark.parametrize("name", [
    "rotation_axis0", "rotation_axis1", "rotation_axis2", "rotation_scale", "rotation_outside", "scale_down",
    "scale_up_outside", "two_labels", "dummy2d_rotation_scale",
])
def test_rotation_and_scaling_equal_nnunets(golden, name):
    arrays, sidecar = golden(f"augment/spatial_{name}")
    planar = sidecar["dummy_2d"]
    angles = [0.0, 0.0, 0.0, *(sidecar["angles_rad_per_axis"] or [])][-3:]
    matrix = spatial.affine_matrix(jnp.asarray(angles), jnp.float32(sidecar["scale"] or 1), planar)
    np.testing.assert_allclose(matrix[1:, 1:] if planar else matrix, sidecar["affine"], atol=1e-6)
    image, label = jax.jit(spatial.resample_affine, static_argnums=(3, 4))(
        jnp.asarray(arrays["image_in"]), jnp.asarray(arrays["seg_in"][0]), matrix, tuple(sidecar["patch_size"]), planar
    )
    close(image, arrays["image_out"])
    assert np.mean(label != arrays["seg_out"][0]) <= 0.0005  # nnU-Net's tie rule leaves nothing but rounding


@pytest.mark.parametrize("size", [(7, 8, 9), (8, 8, 9), (8, 9, 8)])  # half-voxel offsets on one, two and three axes
def test_ties_between_labels_go_to_the_nearest_voxel_or_the_lowest_label(size):
    label = np.random.default_rng(0).integers(0, 3, size).astype(np.int8)
    patch = (5, 5, 6)
    resample = jax.jit(spatial.resample_affine, static_argnums=(3, 4))
    ours = np.asarray(resample(jnp.zeros((1, *size)), jnp.asarray(label), jnp.eye(3), patch, False)[1])
    for voxel in np.ndindex(patch):
        at = np.array(voxel) + (np.array(size) - patch) / 2
        corners = np.stack(np.meshgrid(*[sorted({math.floor(a), math.ceil(a)}) for a in at], indexing="ij"))
        counts = np.bincount(label[tuple(corners.reshape(3, -1))], minlength=3)
        near = label[tuple(np.round(at).astype(int))]  # half to even
        assert ours[voxel] == (near if counts[near] == counts.max() else counts.argmax())


@pytest.mark.parametrize("name", ["crop_even_odd", "crop_larger_than_input", "dummy2d_crop"])
def test_the_centre_crop_equals_nnunets(golden, name):
    arrays, sidecar = golden(f"augment/spatial_{name}")
    image, label = spatial.centre_crop(
        jnp.asarray(arrays["image_in"]), jnp.asarray(arrays["seg_in"][0]), tuple(sidecar["patch_size"])
    )
    np.testing.assert_array_equal(image, arrays["image_out"])
    np.testing.assert_array_equal(label, arrays["seg_out"][0])


def only_channels(values, channels, others):
    """Parameters of three channels, those of the untouched ones being `others`."""
    full = np.full((3, *np.shape(values)[1:]), others, np.float32)
    full[channels] = values
    return jnp.asarray(full)


def test_brightness_equals_nnunets(golden):
    arrays, sidecar = golden("augment/brightness")
    p = sidecar["parameters"]
    close(intensity.brightness(jnp.asarray(arrays["image_in"]), only_channels(p["factor"], p["channels"], 1)), arrays["image_out"])


def test_contrast_equals_nnunets(golden):
    arrays, sidecar = golden("augment/contrast")
    factor = jnp.asarray(sidecar["parameters"]["factor"])
    close(intensity.contrast(jnp.asarray(arrays["image_in"]), factor), arrays["image_out"])


@pytest.mark.parametrize("name", ["gamma", "gamma_inverted", "gamma_constant_image"])
def test_gamma_equals_nnunets(golden, name):
    arrays, sidecar = golden(f"augment/{name}")
    p = sidecar["parameters"]
    ours = intensity.gamma(jnp.asarray(arrays["image_in"]), jnp.asarray(p["gamma"]), p.get("inverted", False))
    close(ours, arrays["image_out"])


def test_blur_equals_nnunets(golden):
    arrays, sidecar = golden("augment/gaussian_blur")
    p = sidecar["parameters"]
    sigma = only_channels(p["sigma_per_axis"], p["channels"], 1)
    chosen = jnp.asarray(np.isin(np.arange(3), p["channels"]))
    close(jax.jit(intensity.gaussian_blur)(jnp.asarray(arrays["image_in"]), sigma, chosen), arrays["image_out"])


@pytest.mark.parametrize(("name", "axes"), [("low_resolution", (0, 1, 2)), ("low_resolution_dummy2d", (1, 2))])
def test_low_resolution_equals_nnunets(golden, name, axes):
    arrays, sidecar = golden(f"augment/{name}")
    p = sidecar["parameters"]
    zoom = only_channels([z[-1] for z in p["zoom"]], p["channels"], 1)
    ours = jax.jit(intensity.low_resolution, static_argnums=2)(jnp.asarray(arrays["image_in"]), zoom, axes)
    close(ours, arrays["image_out"])


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_mirroring_equals_nnunets(golden, axes):
    arrays, _ = golden("augment/mirror")
    name = "axes" + "".join(map(str, axes))
    flips = jnp.isin(jnp.arange(3), jnp.asarray(axes))
    image, label = spatial.mirror(jnp.asarray(arrays["image_in"]), jnp.asarray(arrays["seg_in"][0]), flips, (0, 1, 2))
    np.testing.assert_array_equal(image, arrays[f"image_{name}"])
    np.testing.assert_array_equal(label, arrays[f"seg_{name}"][0])


def test_masking_equals_nnunets(golden):
    arrays, _ = golden("augment/mask_and_remove_label")
    image, label = jnp.asarray(arrays["image_in"]), jnp.asarray(arrays["seg_in"][0])
    np.testing.assert_array_equal(intensity.mask_outside(image, label, (0,)), arrays["image_masked_channel0"])


@pytest.mark.parametrize("row", range(3))
def test_noise_has_nnunets_moments(golden, row):
    _, sidecar = golden("augment/gaussian_noise_statistics")
    reference = sidecar["values"][row]
    std, n = reference["parameter"], reference["voxels"]
    zeros = jnp.zeros((2, 48, 48, n // 48**2))
    noise = np.asarray(intensity.gaussian_noise(jax.random.key(row), zeros, jnp.float32(std)))
    assert abs(noise[0].mean()) <= 4 * std / math.sqrt(n)
    assert abs(noise.std() - std) <= 4 * std / math.sqrt(2 * noise.size)
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) <= 4 / math.sqrt(n)


# Decisions and distributions


def test_rotation_range_pseudo_2d_and_loader_patch_equal_nnunets(golden):
    _, sidecar = golden("augment/loader_patch_decisions")
    for row in sidecar["rows"]:
        is_2d = len(row["patch_size"]) == 2
        patch = (1,) * is_2d + tuple(row["patch_size"])
        policy = make_policy(AugmentConfig(), patch)
        assert policy.max_angle == pytest.approx(row["rotation_range_rad"][1], rel=1e-12)
        assert policy.planar == (row["dummy_2d"] or is_2d)
        assert crop_size(policy, patch) == (1,) * is_2d + tuple(row["loader_patch_size"])
        assert policy.mirror_axes == tuple(axis + is_2d for axis in row["mirror_axes"])


@pytest.mark.parametrize("name", ["isotropic", "dummy2d"])
def test_draws_follow_nnunets_distributions(golden, name):
    _, sidecar = golden(f"augment/parameter_statistics_{name}")
    policy = make_policy(AugmentConfig(), tuple(sidecar["patch_size"]))
    n = 20_000
    keys = jax.random.split(jax.random.key(7), n)
    draw = jax.jit(jax.vmap(lambda key: draw_parameters(key, policy, policy.max_angle, sidecar["channels"])))
    p = jax.tree.map(np.asarray, draw(keys))

    fired = {
        "SpatialTransform.any": p.rotate | p.rescale, "SpatialTransform.rotation": p.rotate,
        "SpatialTransform.scale": p.rescale, "GaussianNoiseTransform": p.noise, "GaussianBlurTransform": p.blur,
        "GaussianBlurTransform.channel": p.blur_channels[p.blur], "MultiplicativeBrightnessTransform": p.brighten,
        "MultiplicativeBrightnessTransform.below_one": p.brightness[p.brighten, 0] < 1, "ContrastTransform": p.stretch,
        "ContrastTransform.below_one": p.contrast[p.stretch, 0] < 1,
        "SimulateLowResolutionTransform": p.lower_resolution,
        "SimulateLowResolutionTransform.channel": p.zoom[p.lower_resolution] < 1, "GammaTransform": p.curve,
        "GammaTransformInverted": p.curve_inverted, "GammaTransform.below_one": p.gamma[p.curve, 0] < 1,
        "GammaTransformInverted.below_one": p.gamma_inverted[p.curve_inverted, 0] < 1,
        **{f"MirrorTransform.axis{a}": p.flips[:, a] for a in range(3)},
    }
    by_construction = {"SimulateLowResolutionTransform.axis0_untouched", "SpatialTransform.scale_same_for_all_axes"}
    assert set(fired) == set(sidecar["fire_probability"]) - by_construction
    for transform, hits in fired.items():
        reference = sidecar["fire_probability"][transform]
        standard_error = math.sqrt(reference["p"] * (1 - reference["p"]) * (1 / hits.size + 1 / reference["n"]))
        assert abs(hits.mean() - reference["p"]) <= 4 * standard_error, transform

    angles = ["angle_in_plane"] if policy.planar else ["angle_axis0", "angle_axis1", "angle_axis2"]
    drawn = {
        **{f"SpatialTransform.{a}": p.angles[p.rotate, 3 - len(angles) + i] for i, a in enumerate(angles)},
        "SpatialTransform.scale": p.scale[p.rescale], "GaussianNoiseTransform.std": p.noise_std[p.noise],
        "GaussianBlurTransform.sigma": p.blur_sigma[p.blur[:, None] & p.blur_channels],
        "MultiplicativeBrightnessTransform.factor": p.brightness[p.brighten],
        "ContrastTransform.factor": p.contrast[p.stretch],
        "SimulateLowResolutionTransform.zoom": p.zoom[p.lower_resolution][p.zoom[p.lower_resolution] < 1],
        "GammaTransform.gamma": p.gamma[p.curve], "GammaTransformInverted.gamma": p.gamma_inverted[p.curve_inverted],
    }
    assert set(drawn) == set(sidecar["parameters"])
    for parameter, values in drawn.items():
        reference = sidecar["parameters"][parameter]
        quantiles = np.array([[float(q), at] for q, at in reference["quantiles"].items()])
        distance = np.abs(np.mean(values.ravel()[:, None] <= quantiles[1:-1, 1], axis=0) - quantiles[1:-1, 0]).max()
        assert distance <= 1.95 * math.sqrt(1 / values.size + 1 / reference["n"]), parameter


def test_the_policy_does_not_flip_between_stages_unless_asked():
    planned, early = (40, 224, 224), (40, 64, 64)
    policy, authors = (make_policy(AugmentConfig(per_stage=flag), planned) for flag in (False, True))
    assert crop_size(policy, early) == (40, 75, 75)  # pseudo-2D, as planned
    assert crop_size(authors, early) == (78, 102, 88)  # 30 degrees around all axes
    assert crop_size(policy, planned) == crop_size(authors, planned)


# The pipeline


def test_the_same_key_gives_the_same_bits_and_another_key_others():
    image, label = batch(DEFAULT)
    a, b, c = (run(jax.random.key(seed), image, label, DEFAULT, PATCH) for seed in (3, 3, 4))
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])
    assert all(np.any(x != y) for x, y in zip(a[0], c[0], strict=True))


def test_a_sample_does_not_depend_on_the_others_in_its_batch():
    image, label = batch(DEFAULT)
    whole = run(jax.random.key(3), image, label, DEFAULT, PATCH)
    part = run(jax.random.key(3), image[:2], label[:2], DEFAULT, PATCH)
    np.testing.assert_array_equal(whole[0][:2], part[0])
    np.testing.assert_array_equal(whole[1][:2], part[1])


def test_all_samples_at_once_as_on_a_gpu_gives_what_one_by_one_gives(monkeypatch):
    image, label = batch(DEFAULT)
    one_by_one = run(jax.random.key(3), image, label, DEFAULT, PATCH)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    at_once = jax.jit(lambda *args: augment(*args, DEFAULT, PATCH))(jax.random.key(3), image, label)
    np.testing.assert_allclose(at_once[0], one_by_one[0], atol=1e-4)
    assert np.mean(at_once[1] != one_by_one[1]) <= 1e-3  # rounding may turn a near tie


INTENSITY = ("p_noise", "p_blur", "p_brightness", "p_contrast", "p_low_resolution", "p_gamma", "p_gamma_inverted")


@pytest.mark.parametrize("planned", [(11, 16, 13), (1, 17, 15)])  # 3D and 2D, odd sizes
def test_labels_move_with_images(planned):
    policy = make_policy(AugmentConfig(), planned)
    policy = dataclasses.replace(policy, p_rotation=0.8, p_scale=0.8, **dict.fromkeys(INTENSITY, 0.0))
    shape = (8, *crop_size(policy, planned))
    label = np.random.default_rng(0).integers(0, 2, shape).astype(np.int8)
    image = jnp.asarray(label[..., None], jnp.float32)
    moved, target = run(jax.random.key(1), image, jnp.asarray(label), policy, planned)
    assert moved.shape == (8, *planned, 1)
    assert target.shape == (8, *planned)
    # between label 0, label 1 and the outside: a majority always wins, and nothing wins with less than a third
    assert np.all(target[moved[..., 0] > 0.501] == 1)
    assert np.all(moved[..., 0][target == 1] > 0.33)
    assert np.any(moved != np.round(moved))


def test_everything_at_once_stays_finite_even_for_a_crop_of_air_and_a_single_slice():
    slice_patch = (1, 17, 15)
    policy = dataclasses.replace(make_policy(AugmentConfig(), slice_patch), **dict.fromkeys(INTENSITY, 1.0))
    image, label = batch(policy, slice_patch)
    image = image.at[0].set(0)  # no range, no standard deviation
    augmented, _ = run(jax.random.key(1), image, label, policy, slice_patch)
    assert augmented.shape == (6, *slice_patch, 2)
    assert np.all(np.isfinite(augmented))


def test_without_anything_the_centre_of_the_crop_comes_out_with_background_outside():
    policy = make_policy(AugmentConfig("none"), PATCH)
    assert crop_size(policy, PATCH) == PATCH
    image, label = batch(policy, dtype=np.float16)
    same_image, same_label = run(jax.random.key(0), image, label, policy, PATCH)
    assert same_image.dtype == jnp.float32
    np.testing.assert_array_equal(same_image, image.astype(jnp.float32))
    np.testing.assert_array_equal(same_label, np.maximum(label, 0))


def test_light_augmentation_reads_no_more_than_the_patch_and_flips_whole_patches():
    assert crop_size(make_policy(AugmentConfig("light"), PATCH), PATCH) == PATCH
    image, label = batch(ONLY_MIRROR, size=16)
    flipped, target = run(jax.random.key(5), image, label, ONLY_MIRROR, PATCH)
    subsets = [axes for n in range(4) for axes in combinations(range(3), n)]
    seen = set()
    for i in range(16):
        candidates = [axes for axes in subsets if np.array_equal(np.flip(image[i], axes), flipped[i])]
        assert len(candidates) == 1
        np.testing.assert_array_equal(target[i], np.maximum(np.flip(label[i], candidates[0]), 0))
        seen.update(candidates)
    assert len(seen) >= 5


def test_half_precision_images_are_interpolated_in_float32():
    image, label = batch(DEFAULT, dtype=np.float16)
    image, label = jnp.moveaxis(image[0], -1, 0), label[0]
    matrix = spatial.affine_matrix(jnp.array([0.1, 0.2, 0.3]), jnp.float32(1.1), False)
    resample = jax.jit(spatial.resample_affine, static_argnums=(3, 4))
    half, _ = resample(image, label, matrix, PATCH, False)
    full, _ = resample(image.astype(jnp.float32), label, matrix, PATCH, False)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, atol=1e-5)  # float16 sums would be off by 1e-3


def test_masked_channels_are_zero_outside_even_after_noise():
    policy = dataclasses.replace(ONLY_MIRROR, p_noise=1.0, masked_channels=(1,), mirror_axes=())
    image, label = batch(policy)
    noisy, _ = run(jax.random.key(0), image, label, policy, PATCH)
    assert np.all(noisy[..., 1][label < 0] == 0)
    assert np.all(noisy[..., 0][label < 0] != 0)
    assert np.all(noisy[..., 1][label >= 0] != image[..., 1][label >= 0])


# Left and right

SIDED = Labels(("background", "kidney_left", "kidney_right", "liver"), (0, 1, 2, 3), None, None)


def test_a_left_right_flip_exchanges_left_and_right_labels_and_no_other_flip_does():
    config = AugmentConfig("light", mirror="label-swap")
    policy = make_policy(config, PATCH, labels=SIDED, left_right_axis=2)
    assert policy.swap_pairs == ((1, 2),)
    label = jnp.asarray(np.random.default_rng(0).integers(0, 4, PATCH), jnp.int8)
    image = jnp.zeros((1, *PATCH))
    for axis in range(3):
        flips = jnp.arange(3) == axis
        _, ours = spatial.mirror(image, label, flips, policy.mirror_axes, policy.swap_axis, policy.swap_pairs)
        expected = np.flip(label, axis)
        np.testing.assert_array_equal(ours, np.array([0, 2, 1, 3])[expected] if axis == 2 else expected)


def test_swapping_labels_twice_gives_them_back_and_leaves_others_alone():
    label = jnp.arange(-1, 120).astype(jnp.int8)
    pairs = ((3, 5), (10, 9))
    swapped = spatial.swap_labels(label, pairs)
    np.testing.assert_array_equal(spatial.swap_labels(swapped, pairs), label)
    np.testing.assert_array_equal(np.flatnonzero(swapped != label) - 1, [3, 5, 9, 10])


def test_label_swap_without_pairs_or_axis_is_refused():
    config = AugmentConfig(mirror="label-swap")
    with pytest.raises(InputError, match="no label names form left/right pairs"):
        make_policy(config, PATCH, labels=Labels(("background", "liver"), (0, 1), None, None), left_right_axis=2)
    with pytest.raises(InputError, match="left-right axis None"):
        make_policy(config, PATCH, labels=SIDED)
    given = dataclasses.replace(config, label_pairs=((1, 3),), left_right_axis=0)
    assert make_policy(given, PATCH).swap_pairs == ((1, 3),)
    in_files = Labels(("background", "a", "b"), (0, 1, 2), None, None, (0, 10, 30))
    assert make_policy(dataclasses.replace(given, label_pairs=((30, 10),)), PATCH, labels=in_files).swap_pairs == ((2, 1),)
    regions = Labels(("background", "all", "core"), (0, (1, 2), 2), None, (1, 2))
    with pytest.raises(InputError, match="is no region"):
        make_policy(dataclasses.replace(given, label_pairs=((1, 2),)), PATCH, labels=regions)


def test_mirroring_can_be_switched_off():
    assert make_policy(AugmentConfig(mirror="none"), PATCH).mirror_axes == ()
