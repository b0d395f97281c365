"""Dice plus cross-entropy with deep supervision, as nnU-Net trains with it.

Targets are integer label maps; -1 (outside the preprocessed volume) counts as background. One-hot and region targets
are never stored: they are comparisons that the compiler fuses into the sums. Everything is computed in float32.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgps_jax.data.labels import Labels

SMOOTH = 1e-5  # added to numerator and denominator of the soft Dice
SPACE = (1, 2, 3)


def deep_supervision_weights(num_heads: int) -> tuple[float, ...]:
    """Weights of the heads, full resolution first: 1, 1/2, 1/4, ..., the last one 0, scaled to sum 1 (nnU-Net's rule).

    A single head has weight 1 (nnU-Net's rule would divide by zero).

    >>> deep_supervision_weights(3)
    (0.6666666666666666, 0.3333333333333333, 0.0)
    """
    if num_heads == 1:
        return (1.0,)
    weights = [2.0**-level for level in range(num_heads - 1)]
    return (*(w / sum(weights) for w in weights), 0.0)


def downsample_target(label: Int[Array, "b d h w"], shape: Sequence[int]) -> Int[Array, "b d2 h2 w2"]:
    """Label map at the spatial `shape` of a lower head: voxel i takes voxel floor((i + 0.5) * old / new)."""
    for axis, new in zip(SPACE, shape, strict=True):
        old = label.shape[axis]
        if old % new == 0:  # a strided slice is cheaper than a gather
            label = jax.lax.slice_in_dim(label, old // new // 2, None, old // new, axis)
        else:
            index = np.floor((np.arange(new) + 0.5) * old / new).astype(np.int32)
            label = jnp.take(label, index, axis=axis, unique_indices=True, indices_are_sorted=True)
    return label


def region_targets(label: Int[Array, "b d h w"], labels: Labels) -> Bool[Array, "b d h w k"]:
    """Membership of every voxel in every foreground label or region, in the order of the network's region outputs."""
    members = [value if isinstance(value, tuple) else (value,) for value in labels.foreground]
    return jnp.stack([jnp.isin(label, jnp.asarray(values, label.dtype)) for values in members], axis=-1)


def soft_dice(
    probabilities: Float[Array, "b d h w k"],
    target: Bool[Array, "b d h w k"],
    valid: Bool[Array, "b d h w"] | None = None,
    batch_dice: bool = False,
) -> Float[Array, ""]:
    """Mean soft Dice over classes (and over samples unless `batch_dice`), in [0, 1].

    dice = (2 I + s) / max(G + P + s, 1e-8) with I = sum(p y), P = sum(p), G = sum(y) over space, and over the batch too
    with `batch_dice`; s = 1e-5. A class that is absent is not skipped: it counts as s / (P + s).
    """
    if valid is not None:
        probabilities = probabilities * valid[..., None]
        target = target & valid[..., None]
    axes = (0, *SPACE) if batch_dice else SPACE
    intersection = jnp.sum(jnp.where(target, probabilities, 0.0), axes)
    predicted = jnp.sum(probabilities, axes)
    present = jnp.sum(target, axes, dtype=jnp.float32)
    return jnp.mean((2 * intersection + SMOOTH) / jnp.maximum(present + predicted + SMOOTH, 1e-8))


def dice_cross_entropy(
    logits: Float[Array, "b d h w k"], label: Int[Array, "b d h w"], ignore: int | None = None, batch_dice: bool = False
) -> Float[Array, ""]:
    """Mean cross-entropy of the softmax minus the soft Dice of the classes 1, 2, ... (background left out).

    Voxels of the `ignore` label count in neither; without any other voxel the cross-entropy is 0.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    classes = jnp.arange(logits.shape[-1], dtype=label.dtype)
    valid = None if ignore is None else label != ignore
    known = jnp.maximum(label, 0) if valid is None else jnp.where(valid, jnp.maximum(label, 0), 0)
    target = known[..., None] == classes
    nll = -jnp.sum(jnp.where(target, log_p, 0.0), axis=-1)
    if valid is None:
        cross_entropy = jnp.mean(nll)
    else:
        count = jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1.0)
        cross_entropy = jnp.sum(jnp.sum(nll * valid, axis=-1) / count)  # row by row: XLA adds up naively on CPU
    return cross_entropy - soft_dice(jnp.exp(log_p[..., 1:]), target[..., 1:], valid, batch_dice)


def dice_binary_cross_entropy(
    logits: Float[Array, "b d h w k"],
    target: Bool[Array, "b d h w k"],
    valid: Bool[Array, "b d h w"] | None = None,
    batch_dice: bool = False,
) -> Float[Array, ""]:
    """Binary cross-entropy of the sigmoid minus the soft Dice, for overlapping regions.

    As in nnU-Net the cross-entropy is the mean over voxels and regions, but with an ignore label (`valid`) the sum
    over both divided by the number of valid voxels: as many times larger as there are regions.
    """
    logits = logits.astype(jnp.float32)
    bce = jnp.maximum(logits, 0) - jnp.where(target, logits, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    if valid is None:
        cross_entropy = jnp.mean(bce)
    else:
        count = jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1e-8)
        cross_entropy = jnp.sum(jnp.sum(bce * valid[..., None], axis=(-2, -1)) / count)
    return cross_entropy - soft_dice(jax.nn.sigmoid(logits), target, valid, batch_dice)


def segmentation_loss(
    logits: tuple[Float[Array, "b _ _ _ k"], ...], label: Int[Array, "b d h w"], labels: Labels, batch_dice: bool
) -> Float[Array, ""]:
    """The training loss: Dice plus (binary) cross-entropy of every head, weighted and summed.

    Args:
        logits: one map per head, full resolution first; the targets of the lower ones are made from their shapes.
        label: label map at full resolution; -1 counts as background.
        labels: what the values mean; decides between softmax and regions, and which value is ignored.
        batch_dice: compute the Dice over the whole batch instead of per sample (decided by the plan).
    """
    total = jnp.zeros((), jnp.float32)
    for weight, head in zip(deep_supervision_weights(len(logits)), logits, strict=True):
        if weight == 0:  # no gradient must reach this head, not even 0 * inf
            continue
        target = downsample_target(label, head.shape[1:4])
        if labels.has_regions:
            valid = None if labels.ignore is None else target != labels.ignore
            loss = dice_binary_cross_entropy(head, region_targets(target, labels), valid, batch_dice)
        else:
            loss = dice_cross_entropy(head, target, labels.ignore, batch_dice)
        total += weight * loss
    return total


def hard_counts(
    logits: Float[Array, "b d h w k"], label: Int[Array, "b d h w"], labels: Labels
) -> tuple[Float[Array, " f"], Float[Array, " f"], Float[Array, " f"]]:
    """True positives, false positives and false negatives per foreground class or region over batch and space.

    Prediction: the largest logit, or sigmoid > 0.5 with regions. Ignored voxels count nowhere. For the pseudo-Dice.
    """
    if labels.has_regions:
        target, predicted = region_targets(label, labels), logits > 0
    else:
        classes = jnp.arange(1, logits.shape[-1], dtype=label.dtype)
        target = label[..., None] == classes
        predicted = jnp.argmax(logits, axis=-1).astype(label.dtype)[..., None] == classes
    if labels.ignore is not None:
        valid = (label != labels.ignore)[..., None]
        target, predicted = target & valid, predicted & valid

    def count(mask: Bool[Array, "b d h w f"]) -> Float[Array, " f"]:
        return jnp.sum(mask, (0, *SPACE), dtype=jnp.int32).astype(jnp.float32)

    return count(target & predicted), count(~target & predicted), count(target & ~predicted)
