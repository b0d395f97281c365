"""The loss equals nnU-Net's in value and gradient, and does what its words say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgps_jax.data.dataset import Labels
from pgps_jax.train.losses import (
    deep_supervision_weights,
    dice_cross_entropy,
    downsample_target,
    hard_counts,
    region_targets,
    segmentation_loss,
)

REGIONS = ((1, 2, 3), (2, 3), (3,))


def softmax_labels(num_classes: int, ignore: int | None = None) -> Labels:
    names = ("background", *(f"class {k}" for k in range(1, num_classes)))
    return Labels(names=names, values=tuple(range(num_classes)), ignore=ignore, regions_class_order=None)


def region_labels(ignore: int | None = None) -> Labels:
    return Labels(("background", "whole", "core", "inner"), (0, *REGIONS), ignore, (1, 2, 3))


def channels_last(x: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(x, 1, -1))


def label_map(target: np.ndarray, labels: Labels) -> jax.Array:
    """The label map behind a golden target (regions are nested, so that their number is the label)."""
    if not labels.has_regions:
        return jnp.asarray(target[:, 0])
    label = target[:, :3].sum(1)
    return jnp.asarray(label if labels.ignore is None else np.where(target[:, 3] == 1, labels.ignore, label))


def check_against_golden(arrays: dict, sidecar: dict, labels: Labels, batch_dice: bool) -> None:
    num_heads = sum(name.startswith("logits_") for name in arrays)
    logits = tuple(channels_last(arrays[f"logits_{j}"]) for j in range(num_heads))
    label = label_map(arrays["target_0"], labels)
    loss, gradients = jax.jit(jax.value_and_grad(lambda z: segmentation_loss(z, label, labels, batch_dice)))(logits)
    assert abs(float(loss) - float(arrays["loss__f64"])) <= 2e-6
    for j, gradient in enumerate(gradients):
        expected = np.moveaxis(arrays[f"grad_logits_{j}"], 1, -1)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6 + 1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", [
    "dc_ce_batchdice_true", "dc_ce_batchdice_false", "dc_ce_empty_target",
    "dc_ce_ignore_batchdice_true", "dc_ce_ignore_batchdice_false", "dc_ce_all_ignored",
])
def test_dice_and_cross_entropy_equal_nnunet(golden, name):
    arrays, sidecar = golden(f"loss/{name}")
    check_against_golden(arrays, sidecar, softmax_labels(4, sidecar.get("ignore_label")), sidecar["batch_dice"])


@pytest.mark.parametrize("name", ["batchdice_true", "batchdice_false", "ignore"])
def test_dice_and_binary_cross_entropy_of_regions_equal_nnunet(golden, name):
    arrays, sidecar = golden(f"loss/dc_bce_regions_{name}")
    check_against_golden(arrays, sidecar, region_labels(sidecar.get("ignore_label")), sidecar["batch_dice"])


def test_deep_supervision_equals_nnunet(golden):
    arrays, sidecar = golden("loss/deep_supervision")
    check_against_golden(arrays, sidecar, softmax_labels(3), sidecar.get("batch_dice", False))


def test_deep_supervision_weights_equal_nnunet(golden):
    _, sidecar = golden("loss/deep_supervision_weights")
    for num_heads in range(2, 8):
        np.testing.assert_allclose(deep_supervision_weights(num_heads), sidecar[str(num_heads)], rtol=1e-15)
    assert deep_supervision_weights(1) == (1.0,)


def test_targets_of_lower_heads_equal_nnunet(golden):
    arrays, _ = golden("loss/target_downsampling")
    for name in ("even", "odd"):
        levels = [arrays[f"{name}_{j}"] for j in range(4) if f"{name}_{j}" in arrays]
        levels = [x[:, 0] if x.ndim == 5 else x for x in levels]
        for expected in levels:
            np.testing.assert_array_equal(downsample_target(jnp.asarray(levels[0]), expected.shape[1:]), expected)


def test_regions_of_a_label_map_equal_nnunet(golden):
    arrays, _ = golden("loss/regions_conversion")
    regions = region_targets(jnp.asarray(arrays["label_map"][:, 0]), region_labels(4))
    np.testing.assert_array_equal(np.moveaxis(np.asarray(regions), -1, 1), arrays["multi_hot"][:, :3])


def test_outside_the_volume_counts_as_background():
    rng = np.random.default_rng(0)
    logits = (jnp.asarray(rng.normal(size=(2, 4, 6, 5, 3)), jnp.float32),)
    label = rng.integers(-1, 3, (2, 4, 6, 5)).astype(np.int8)
    for labels in (softmax_labels(3), softmax_labels(3, ignore=3), region_labels()):
        loss = jax.jit(lambda label, labels=labels: segmentation_loss(logits, label, labels, False))
        assert float(loss(label)) == float(loss(np.maximum(label, 0)))


def test_the_head_of_weight_zero_gets_no_gradient_even_when_its_logits_are_not_finite():
    logits = (jnp.zeros((1, 4, 4, 4, 2)), jnp.full((1, 2, 2, 2, 2), jnp.inf))
    label = jnp.ones((1, 4, 4, 4), jnp.int8)
    loss_and_gradient = jax.jit(jax.value_and_grad(lambda z: segmentation_loss(z, label, softmax_labels(2), False)))
    loss, (_, gradient) = loss_and_gradient(logits)
    assert np.isfinite(loss)
    assert not np.any(gradient)


def test_loss_is_computed_in_float32_when_logits_are_bfloat16():
    logits = jax.random.normal(jax.random.key(0), (1, 8, 8, 8, 3)).astype(jnp.bfloat16)
    label = jax.random.randint(jax.random.key(1), (1, 8, 8, 8), 0, 3, jnp.int8)
    loss = jax.jit(dice_cross_entropy)
    assert loss(logits, label).dtype == jnp.float32
    assert float(loss(logits, label)) == float(loss(logits.astype(jnp.float32), label))


@pytest.mark.parametrize("labels", [softmax_labels(4), softmax_labels(4, ignore=4), region_labels(), region_labels(4)])
def test_hard_counts_equal_counting_voxel_by_voxel(labels):
    rng = np.random.default_rng(1)
    num_outputs = 3 if labels.has_regions else 4
    logits = rng.normal(size=(2, 3, 4, 5, num_outputs)).astype(np.float32)
    label = rng.integers(0, 5 if labels.ignore else 4, (2, 3, 4, 5)).astype(np.int8)
    valid = label != labels.ignore if labels.ignore else np.ones_like(label, bool)
    expected = np.zeros((3, 3))
    for k in range(3):
        predicted = logits[..., k] > 0 if labels.has_regions else logits.argmax(-1) == k + 1
        target = np.isin(label, REGIONS[k]) if labels.has_regions else label == k + 1
        for row, hits in enumerate((target & predicted, ~target & predicted, target & ~predicted)):
            expected[row, k] = (hits & valid).sum()
    np.testing.assert_array_equal(np.stack(hard_counts(jnp.asarray(logits), jnp.asarray(label), labels)), expected)


def test_an_absent_class_scores_by_its_predicted_volume_against_the_smoothing_term():
    p = 1.25e-6  # in 8 voxels: 1e-5 predicted, as much as the smoothing term
    logits = jnp.zeros((1, 2, 2, 2, 2)).at[..., 1].set(np.log(p / (1 - p)))
    loss = jax.jit(dice_cross_entropy)(logits, jnp.zeros((1, 2, 2, 2), jnp.int8))
    np.testing.assert_allclose(loss, -np.log(1 - p) - 0.5, atol=1e-4)
