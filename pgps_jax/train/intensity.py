"""Intensity augmentation of one patch (c, d, h, w), each transform with fixed parameters and in float32.

The rules are those of nnU-Net's default training pipeline. Parameters are per channel where nnU-Net's are.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

SPACE = (1, 2, 3)
BLUR_RADIUS = 3  # taps on each side at the largest sigma, 1


def gaussian_noise(
    key: Key[Array, ""], image: Float[Array, "c d h w"], std: Float[Array, ""]
) -> Float[Array, "c d h w"]:
    """Add independent normal noise of one standard deviation to all channels."""
    return image + std * jax.random.normal(key, (image.size,)).reshape(image.shape)  # drawn flat: compiles faster


def brightness(image: Float[Array, "c d h w"], factor: Float[Array, " c"]) -> Float[Array, "c d h w"]:
    """Multiply every channel by its factor."""
    return image * _per_channel(factor)


def contrast(image: Float[Array, "c d h w"], factor: Float[Array, " c"]) -> Float[Array, "c d h w"]:
    """Stretch every channel around its mean by its factor; values stay within the channel's old range."""
    mean = jnp.mean(image, SPACE, keepdims=True)
    low, high = jnp.min(image, SPACE, keepdims=True), jnp.max(image, SPACE, keepdims=True)
    return jnp.clip((image - mean) * _per_channel(factor) + mean, low, high)


def gamma(
    image: Float[Array, "c d h w"], exponent: Float[Array, " c"], inverted: Bool[Array, ""] | bool = False
) -> Float[Array, "c d h w"]:
    """Raise every channel, scaled to [0, 1], to its exponent; mean and standard deviation are kept.

    `inverted` does it to the negated image. The standard deviation is the unbiased one, as PyTorch's.
    """
    sign = jnp.where(inverted, -1.0, 1.0)
    image = sign * image
    mean, std = _moments(image)
    low = jnp.min(image, SPACE, keepdims=True)
    extent = jnp.max(image, SPACE, keepdims=True) - low
    curved = ((image - low) / jnp.maximum(extent, 1e-7)) ** _per_channel(exponent) * extent + low
    new_mean, new_std = _moments(curved)
    return sign * ((curved - new_mean) * std / jnp.maximum(new_std, 1e-7) + mean)


def gaussian_blur(
    image: Float[Array, "c d h w"], sigma: Float[Array, "c 3"], chosen: Bool[Array, " c"]
) -> Float[Array, "c d h w"]:
    """Blur the chosen channels, every axis with its own sigma (in voxels, at most 1); the border is reflected.

    The kernel has the odd number of taps nearest to 6 sigma + 0.5, normalised. Axes of size 1 are left alone.
    """
    matrices = [
        jax.vmap(lambda s, n=n: _blur_matrix(s, n))(jnp.where(chosen, sigma[:, axis], 0.0)) if n > 1 else None
        for axis, n in enumerate(image.shape[1:])
    ]
    return _along_axes(image, matrices)


def low_resolution(
    image: Float[Array, "c d h w"], zoom: Float[Array, " c"], axes: Sequence[int] = (0, 1, 2)
) -> Float[Array, "c d h w"]:
    """Sample every channel down to round(size * zoom) voxels (nearest-exact) and linearly up again.

    zoom 1 changes nothing.
    """
    matrices = [
        jax.vmap(lambda z, n=n: _low_resolution_matrix(z, n))(zoom) if axis in axes and n > 1 else None
        for axis, n in enumerate(image.shape[1:])
    ]
    return _along_axes(image, matrices)


def mask_outside(
    image: Float[Array, "c d h w"], label: Int[Array, "d h w"], channels: Sequence[int]
) -> Float[Array, "c d h w"]:
    """Set the given channels to 0 where the label is negative (outside the mask that normalised them)."""
    masked = np.isin(np.arange(image.shape[0]), channels)
    return jnp.where(masked[:, None, None, None] & (label < 0), 0.0, image)


def _per_channel(values: Float[Array, " c"]) -> Float[Array, "c 1 1 1"]:
    return values[:, None, None, None]


def _moments(image: Float[Array, "c d h w"]) -> tuple[Float[Array, "c 1 1 1"], Float[Array, "c 1 1 1"]]:
    return jnp.mean(image, SPACE, keepdims=True), jnp.std(image, SPACE, keepdims=True, ddof=1)


def _along_axes(
    image: Float[Array, "c d h w"], matrices: list[Float[Array, "c _ _"] | None]
) -> Float[Array, "c d h w"]:
    """Apply one matrix per channel and axis. Small products are fast everywhere, where gathers are not."""
    for subscripts, matrix in zip(("cij,cjhw->cihw", "cij,cdjw->cdiw", "cij,cdhj->cdhi"), matrices, strict=True):
        if matrix is not None:
            image = jnp.einsum(subscripts, matrix, image, precision=jax.lax.Precision.HIGHEST)
    return image


def _blur_matrix(sigma: Float[Array, ""], n: int) -> Float[Array, "{n} {n}"]:
    """Row i holds the weights with which the voxels of a line enter blurred voxel i; sigma 0: the identity."""
    offsets = np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    radius = jnp.round(3 * sigma - 0.25)
    weights = jnp.exp(-0.5 * (offsets / jnp.maximum(sigma, 1e-3)) ** 2) * (np.abs(offsets) <= radius)
    weights = jnp.where(sigma > 0, weights / jnp.sum(weights), offsets == 0)
    period = 2 * (n - 1)
    position = (np.arange(n)[:, None] + offsets) % period
    source = np.where(position < n, position, period - position)  # reflection without repeating the border voxel
    return jnp.sum(jnp.where(source[:, :, None] == np.arange(n), weights[:, None], 0.0), axis=1)


def _low_resolution_matrix(zoom: Float[Array, ""], n: int) -> Float[Array, "{n} {n}"]:
    """Row i holds the weights with which the voxels of a line enter voxel i after sampling down and up."""
    small = jnp.round(n * zoom)
    position = jnp.clip((jnp.arange(n) + 0.5) * small / n - 0.5, 0.0, small - 1)
    lower = jnp.floor(position)
    fraction = (position - lower)[:, None]

    def kept(j: Float[Array, " n"]) -> Bool[Array, "n n"]:  # whole numbers, so that no rounding moves a voxel
        k, m = j.astype(jnp.int32), small.astype(jnp.int32)
        return ((2 * k + 1) * n // (2 * m))[:, None] == np.arange(n)

    return jnp.where(kept(lower), 1 - fraction, 0.0) + jnp.where(kept(jnp.minimum(lower + 1, small - 1)), fraction, 0.0)
