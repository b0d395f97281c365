"""Every transform equals nnU-Net's, the draws follow its distributions, and batches can be made again."""

import dataclasses
import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgps_jax.data.dataset import Labels
from pgps_jax.errors import InputError
from pgps_jax.train import augment as augment_module
from pgps_jax.train import intensity, spatial
from pgps_jax.train.augment import (
    AugmentConfig,
    augment,
    crop_size,
    draw_parameters,
    make_policy,
    rotation_range,
)

PATCH = (12, 16, 14)
DEFAULT = make_policy(AugmentConfig(), PATCH)
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
    assert doctest.testmod(augment_module).attempted > 0
    assert doctest.testmod(augment_module).failed == 0


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
    close(intensity.gaussian_blur(jnp.asarray(arrays["image_in"]), sigma, chosen), arrays["image_out"])


@pytest.mark.parametrize(("name", "axes"), [("low_resolution", (0, 1, 2)), ("low_resolution_dummy2d", (1, 2))])
def test_low_resolution_equals_nnunets(golden, name, axes):
    arrays, sidecar = golden(f"augment/{name}")
    p = sidecar["parameters"]
    zoom = only_channels([z[-1] for z in p["zoom"]], p["channels"], 1)
    close(intensity.low_resolution(jnp.asarray(arrays["image_in"]), zoom, axes), arrays["image_out"])


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


@pytest.mark.parametrize("policy", [DEFAULT, dataclasses.replace(DEFAULT, planar=True, max_angle=math.pi)])
def test_a_sample_does_not_depend_on_the_others_nor_on_the_platforms_way(policy):
    image, label = batch(policy)
    whole_image, whole_label = run(jax.random.key(3), image, label, policy, PATCH)
    part_image, part_label = run(jax.random.key(3), image[:2], label[:2], policy, PATCH)
    np.testing.assert_array_equal(whole_image[:2], part_image)
    np.testing.assert_array_equal(whole_label[:2], part_label)
    at_once = jax.vmap(lambda i: _augment_one(jax.random.key(3), i, image, label, policy))  # as on a GPU
    vmapped_image, vmapped_label = jax.jit(at_once)(jnp.arange(6))
    np.testing.assert_allclose(vmapped_image, whole_image, atol=1e-4)
    np.testing.assert_array_equal(vmapped_label, whole_label)


def _augment_one(key, i, image, label, policy):
    draws, noise_key = jax.random.split(jax.random.fold_in(key, i))
    parameters = draw_parameters(draws, policy, policy.max_angle, image.shape[-1])
    x, y = augment_module.apply_parameters(
        noise_key, parameters, jnp.moveaxis(image[i], -1, 0), label[i], policy, PATCH, policy.planar
    )
    return jnp.moveaxis(x, 0, -1), y
