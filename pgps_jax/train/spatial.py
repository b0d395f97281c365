"""Rotation, scaling and mirroring of one patch and its label map, each with fixed parameters.

Arrays are (c, d, h, w) and (d, h, w). Outside the input the image is 0 and the label -1.
"""

from collections.abc import Sequence
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgps_jax.architecture import Size

OUTSIDE = -1  # label of voxels outside the preprocessed volume


def affine_matrix(angles: Float[Array, "3"], scale: Float[Array, ""], planar: bool) -> Float[Array, "3 3"]:
    """Matrix from centred output to centred source coordinates, in voxels: rotation times scale.

    Rd turns the axes (h, w), Rh (d, w), Rw (d, h), and R = Rw Rh Rd; scale > 1 makes objects smaller. `planar`: only
    (h, w) are turned, by the last angle, and scaled (nnU-Net's pseudo-2D augmentation of anisotropic patches).
    """
    if planar:
        c, s = jnp.cos(angles[2]) * scale, jnp.sin(angles[2]) * scale
        return jnp.array([[1, 0, 0], [0, c, -s], [0, s, c]], jnp.float32)
    (cd, ch, cw), (sd, sh, sw) = jnp.cos(angles), jnp.sin(angles)
    rd = jnp.array([[1, 0, 0], [0, cd, -sd], [0, sd, cd]])
    rh = jnp.array([[ch, 0, sh], [0, 1, 0], [-sh, 0, ch]])
    rw = jnp.array([[cw, -sw, 0], [sw, cw, 0], [0, 0, 1]])
    highest = jax.lax.Precision.HIGHEST  # 3x3, but a GPU would round to TF32
    return jnp.matmul(rw, jnp.matmul(rh, rd, precision=highest), precision=highest) * scale


def centre_crop(
    image: Float[Array, "c d h w"], label: Int[Array, "d h w"], patch_size: Size
) -> tuple[Float[Array, "c pd ph pw"], Int[Array, "pd ph pw"]]:
    """The patch in the middle, starting at size // 2 - patch // 2; padded where the input is smaller."""
    for axis, (size, patch) in enumerate(zip(label.shape, patch_size, strict=True)):
        start = size // 2 - patch // 2
        stop = start + patch
        before, after = max(-start, 0), max(stop - size, 0)
        image = jax.lax.slice_in_dim(image, max(start, 0), min(stop, size), axis=axis + 1)
        label = jax.lax.slice_in_dim(label, max(start, 0), min(stop, size), axis=axis)
        if before or after:
            width = [(before, after) if a == axis else (0, 0) for a in range(3)]
            image = jnp.pad(image, [(0, 0), *width])
            label = jnp.pad(label, width, constant_values=OUTSIDE)
    return image, label


def resample_affine(
    image: Float[Array, "c d h w"],
    label: Int[Array, "d h w"],
    matrix: Float[Array, "3 3"],
    patch_size: Size,
    planar: bool,
) -> tuple[Float[Array, "c pd ph pw"], Int[Array, "pd ph pw"]]:
    """Patch sampled at `matrix @ x` for the centred voxel coordinates x of the output; the centres of both coincide.

    Image: trilinear with zeros around, which take part in the interpolation. Label: every label's indicator is
    interpolated in the same way (around the input lies label -1) and the largest one wins, rounded to float16 as
    nnU-Net's; in a tie the nearest voxel's label, else the lowest. Only labels of the eight neighbours can win, so the
    cost does not grow with the number of labels. `planar`: axis d is not interpolated (input and output agree in it).
    """
    source = _source_coordinates(matrix, patch_size, label.shape, planar)
    axes = (1, 2) if planar else (0, 1, 2)
    padding = [(int(axis in axes),) * 2 for axis in range(3)]  # one voxel of surrounding makes border checks needless
    padded_image = jnp.pad(image, [(0, 0), *padding]).reshape(image.shape[0], -1)
    padded_label = jnp.pad(label, padding, constant_values=OUTSIDE)
    strides = (padded_label.shape[1] * padded_label.shape[2], padded_label.shape[2], 1)
    padded_label = padded_label.reshape(-1)

    first = jnp.arange(patch_size[0])[:, None, None] * strides[0] if planar else 0
    fraction, nearest = {}, {}
    for axis in axes:
        at = jnp.clip(source[axis], -1.0, float(label.shape[axis]))
        lower = jnp.minimum(jnp.floor(at), label.shape[axis] - 1)
        fraction[axis] = at - lower
        nearest[axis] = jnp.round(at) - lower  # 0 or 1; half to even
        first = first + (lower.astype(jnp.int32) + 1) * strides[axis]

    sampled, labels, weights = 0.0, [], []
    near_label = jnp.full(patch_size, OUTSIDE, label.dtype)
    for corner in product((0, 1), repeat=len(axes)):
        index = first + sum(offset * strides[axis] for offset, axis in zip(corner, axes, strict=True))
        weight, is_nearest = 1.0, True
        for offset, axis in zip(corner, axes, strict=True):
            weight = weight * (fraction[axis] if offset else 1 - fraction[axis])
            is_nearest = is_nearest & (nearest[axis] == offset)
        sampled = sampled + weight * jnp.stack([_take(c, index) for c in padded_image]).astype(jnp.float32)
        labels.append(_take(padded_label, index))
        weights.append(jnp.broadcast_to(weight, patch_size))
        near_label = jnp.where(is_nearest, labels[-1], near_label)
    return sampled, _vote(labels, weights, near_label)


def _take(flat: Array, index: Int[Array, "pd ph pw"]) -> Array:
    return flat.at[index].get(mode="promise_in_bounds")


def _source_coordinates(
    matrix: Float[Array, "3 3"], patch_size: Size, size: Sequence[int], planar: bool
) -> list[Array]:
    """Where every output voxel looks, in source voxels, per axis; broadcastable to the patch."""
    grids = [
        (jnp.arange(n, dtype=jnp.float32) - (n - 1) / 2).reshape([n if a == axis else 1 for a in range(3)])
        for axis, n in enumerate(patch_size)
    ]
    used = (1, 2) if planar else (0, 1, 2)
    return [sum(matrix[i, j] * grids[j] for j in used) + (size[i] - 1) / 2 for i in range(3)]


def _vote(
    labels: list[Int[Array, "d h w"]], weights: list[Float[Array, "d h w"]], near_label: Int[Array, "d h w"]
) -> Int[Array, "d h w"]:
    """Label of the largest sum of weights among the neighbours."""

    def score(candidate: Int[Array, "d h w"]) -> Float[Array, "d h w"]:
        total = sum(jnp.where(lab == candidate, w, 0.0) for lab, w in zip(labels, weights, strict=True))
        return (total * 1000).astype(jnp.float16)

    best, winner = score(labels[0]), labels[0]
    for candidate in labels[1:]:
        s = score(candidate)
        better = (s > best) | ((s == best) & (candidate < winner))
        winner = jnp.where(better, candidate, winner)
        best = jnp.maximum(best, s)
    return jnp.where(score(near_label) == best, near_label, winner)


def mirror(
    image: Float[Array, "c d h w"],
    label: Int[Array, "d h w"],
    flips: Bool[Array, "3"],
    axes: Sequence[int],
    swap_axis: int | None = None,
    swap_pairs: Sequence[tuple[int, int]] = (),
) -> tuple[Float[Array, "c d h w"], Int[Array, "d h w"]]:
    """Flip those of the `axes` for which `flips` is set.

    A flip of `swap_axis` also exchanges the labels of each pair, so that left stays left.
    """
    for axis in axes:
        flipped = jnp.flip(label, axis)
        if axis == swap_axis:
            flipped = swap_labels(flipped, swap_pairs)
        image = jnp.where(flips[axis], jnp.flip(image, axis + 1), image)
        label = jnp.where(flips[axis], flipped, label)
    return image, label


def swap_labels(label: Int[Array, "..."], pairs: Sequence[tuple[int, int]]) -> Int[Array, "..."]:
    """Label map with the two labels of every pair exchanged; values from -1 up."""
    highest = max((max(pair) for pair in pairs), default=0)
    table = np.arange(-1, highest + 1)
    for a, b in pairs:
        table[a + 1], table[b + 1] = b, a
    index = jnp.minimum(label, highest).astype(jnp.int32) + 1
    return jnp.where(label > highest, label, jnp.asarray(table, label.dtype)[index])
