"""Crop, normalise and resample one case: nnU-Net's rules as pure NumPy/SciPy functions, axes (d, h, w) in array order.

Two things are done differently from nnU-Net because they are many times faster and give the same numbers:

* Spline resampling is separable, so an axis is resampled by one banded matrix product. The matrix is what
  `scipy.ndimage.zoom` does to the unit vectors of that axis, hence the same spline and the same border rule.
* A label map is interpolated only where the neighbours of an output voxel disagree, whatever the number of labels.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from scipy import ndimage

from pgps_jax.architecture import Size
from pgps_jax.errors import InputError

Spacing = tuple[float | int, float | int, float | int]  # mm
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # half-open [low, high) per axis

ANISOTROPY_THRESHOLD = 3.0  # largest / smallest spacing above which slices are resampled one by one
_BAND_TOLERANCE = 1e-10  # spline weights below it are dropped; float32 cannot see them
_PIECE = 2**17  # numbers that are worked on at once: 1 MiB in float64
_BLOCK = 64  # output positions per matrix product: small enough that the band is narrow, large enough for BLAS


# ---------------------------------------------------------------------------------------------------- crop, normalise


def crop_to_nonzero(
    image: Float[np.ndarray, "c d h w"], label: Integer[np.ndarray, "1 d h w"] | None = None
) -> tuple[Float[np.ndarray, "c d2 h2 w2"], Integer[np.ndarray, "1 d2 h2 w2"], Box]:
    """Cut to the box of voxels in which any channel differs from 0; nnU-Net's rule.

    Background voxels outside the body (zero in every channel and not an enclosed hole) are marked -1 in the label map.
    Without a label map the second result is 0 inside and -1 outside.

    Returns:
        views of `image` (not a copy), the int16 label map, and the box in voxels of the input.
    """
    nonzero = (image != 0).any(axis=0)
    box = _bounding_box(nonzero)
    inside = tuple(slice(low, high) for low, high in box)
    nonzero = nonzero[inside]
    seg = np.zeros((1, *nonzero.shape), np.int16) if label is None else label[:, *inside].astype(np.int16)
    if not nonzero.all():
        seg[0][_outside(nonzero) & (seg[0] == 0)] = -1
    return image[:, *inside], seg, box


def _bounding_box(mask: np.ndarray) -> Box:
    if not mask.any():
        return tuple((0, n) for n in mask.shape)  # an empty image is kept whole
    found = []
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        found.append((int(used[0]), int(used[-1]) + 1))
    return tuple(found)


def _outside(mask: np.ndarray) -> np.ndarray:
    """Zero voxels connected by faces to the border of the box; the others are holes and belong to the body."""
    components, _ = ndimage.label(~mask)
    touching = [np.unique(np.take(components, end, axis=axis)) for axis in range(3) for end in (0, -1)]
    at_border = np.zeros(components.max() + 1, bool)
    at_border[np.concatenate(touching)] = True
    at_border[0] = False
    return at_border[components]


def normalise(
    image: Float[np.ndarray, "c d h w"],
    seg: Integer[np.ndarray, "1 d h w"],
    schemes: tuple[str, ...],
    use_mask: tuple[bool, ...],
    intensity_properties: dict[str, dict[str, float]],
) -> Float[np.ndarray, "c d h w"]:
    """Bring each channel to the network's intensity range, by the scheme's nnU-Net class name.

    Args:
        seg: -1 marks what is outside the body; used where `use_mask` is set (z-score of the inside only).
        intensity_properties: of the fingerprint, key = channel number as text; read by CTNormalization.

    Returns:
        a new float32 array.
    """
    image = np.array(image, np.float32)  # the one copy; everything below works in place
    for channel, (scheme, masked) in enumerate(zip(schemes, use_mask, strict=True)):
        x = image[channel]
        if scheme == "ZScoreNormalization":
            if masked:
                inside = seg[0] >= 0
                values = x[inside]
                x[inside] = (values - values.mean()) / max(values.std(), 1e-8)
            else:
                mean, std = x.mean(), x.std()
                x -= mean
                x /= max(std, 1e-8)
        elif scheme == "CTNormalization":
            known = ct_statistics(intensity_properties, channel)
            np.clip(x, known["percentile_00_5"], known["percentile_99_5"], out=x)
            x -= known["mean"]
            x /= max(known["std"], 1e-8)
        elif scheme == "RescaleTo01Normalization":
            x -= x.min()
            x /= max(x.max(), 1e-8)
        elif scheme == "RGBTo01Normalization":
            if x.min() < 0 or x.max() > 255:
                raise InputError(
                    f"Channel {channel} is declared as rgb_to_0_1 but has values from {x.min():g} to {x.max():g}; "
                    "RGB channels must lie in 0..255. Correct channel_names in dataset.json."
                )
            x /= 255.0
        elif scheme != "NoNormalization":
            raise InputError(f"The plan asks for normalization {scheme!r} of channel {channel}, which does not exist.")
    return image


def ct_statistics(intensity_properties: dict[str, dict[str, float]], channel: int) -> dict[str, float]:
    """What CTNormalization needs to know of a channel; InputError where a plan does not tell."""
    known = intensity_properties.get(str(channel), {})
    if missing := [key for key in ("percentile_00_5", "percentile_99_5", "mean", "std") if key not in known]:
        raise InputError(f"The plan normalises channel {channel} by CTNormalization but has no {', '.join(missing)} of it in "
                         "foreground_intensity_properties_per_channel; plan the dataset again.")
    return known


# ------------------------------------------------------------------------------------------------------ geometry rules


def resampled_shape(shape: Size, spacing: Spacing, new_spacing: Spacing) -> Size:
    """Voxels per axis after resampling: round(old spacing / new spacing x old size), halves to even."""
    return tuple(round(old / new * n) for old, new, n in zip(spacing, new_spacing, shape, strict=True))


def coarse_axis(spacing: Spacing, new_spacing: Spacing) -> int | None:
    """The axis along which slices are taken as they are (nearest), or None when all axes are interpolated alike.

    The current spacing decides if it is anisotropic by more than a factor 3, else the new one; the coarsest axis must
    be the only one of that spacing.
    """
    for candidate in (spacing, new_spacing):
        if max(candidate) / min(candidate) > ANISOTROPY_THRESHOLD:
            coarsest = [axis for axis in range(3) if candidate[axis] == max(candidate)]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


# ------------------------------------------------------------------------------------------ images and probabilities


def resample_image(
    image: Float[np.ndarray, "c d h w"], new_shape: Size, spacing: Spacing, new_spacing: Spacing, order: int = 3
) -> Float[np.ndarray, "c d2 h2 w2"]:
    """Resample channels to `new_shape` with splines of the given order (3 cubic, 1 linear), clipped to the old range.

    Coordinates are half-pixel centred, edges are repeated. With one coarse axis (`coarse_axis`) every slice is
    resampled in its plane and slices are taken by nearest neighbour. Computed in float64 and rounded to float32.
    """
    if image.shape[1:] == tuple(new_shape):
        return image
    out = np.empty((len(image), *new_shape), image.dtype)
    for channel, volume in enumerate(image):
        out[channel] = resample_volume(volume, new_shape, spacing, new_spacing, order)
    return out


def resample_volume(
    volume: Float[np.ndarray, "d h w"], new_shape: Size, spacing: Spacing, new_spacing: Spacing, order: int
) -> Float[np.ndarray, "d2 h2 w2"]:
    """`resample_image` of one channel, for callers that cannot hold all channels at both sizes."""
    volume = np.asarray(volume, np.float32)
    axis = coarse_axis(spacing, new_spacing)
    if axis is None:
        return _clip(_resample_axes(volume, new_shape, order), volume.min(), volume.max())
    slices = np.moveaxis(volume, axis, 0)
    plane = tuple(n for a, n in enumerate(new_shape) if a != axis)
    needed, place = np.unique(_taps(slices.shape[0], new_shape[axis]).nearest, return_inverse=True)
    slices = np.ascontiguousarray(slices[needed])
    lowest, highest = slices.min(axis=(1, 2), keepdims=True), slices.max(axis=(1, 2), keepdims=True)
    slices = _clip(_resample_axes(slices, (len(needed), *plane), order), lowest, highest)
    return np.ascontiguousarray(np.moveaxis(slices[place], 0, axis))


def _clip(volume: np.ndarray, lowest, highest) -> np.ndarray:
    return np.clip(volume, lowest, highest, out=volume)  # cubic splines overshoot


def _resample_axes(volume: np.ndarray, new_shape: Size, order: int) -> np.ndarray:
    """A new float32 volume; the work is done in float64 on pieces that fit the cache, and starts where it shrinks."""
    along_depth, in_plane = partial(_along_depth, new_depth=new_shape[0]), partial(_in_plane, new_plane=new_shape[1:])
    steps = (along_depth, in_plane) if new_shape[0] < len(volume) else (in_plane, along_depth)
    result = volume
    for step in steps:
        result = step(result, order=order)
    return volume.copy() if result is volume else result


def _in_plane(volume: np.ndarray, new_plane: tuple[int, int], order: int) -> np.ndarray:
    if volume.shape[1:] == new_plane:
        return volume
    out = np.empty((len(volume), *new_plane), np.float32)
    thickness = max(1, _PIECE // (volume.shape[1] * volume.shape[2]))
    for start in range(0, len(volume), thickness):
        piece = volume[start : start + thickness].astype(np.float64)
        if piece.shape[1] != new_plane[0]:
            resized = np.empty((len(piece), new_plane[0], piece.shape[2]))
            for rows, columns, weights in _operator(piece.shape[1], new_plane[0], order):
                np.matmul(weights, piece[:, columns], out=resized[:, rows])
            piece = resized
        if piece.shape[2] != new_plane[1]:
            resized = np.empty((len(piece), *new_plane))
            for rows, columns, weights in _operator(piece.shape[2], new_plane[1], order):
                np.matmul(piece[:, :, columns], weights.T, out=resized[:, :, rows])
            piece = resized
        out[start : start + thickness] = piece
    return out


def _along_depth(volume: np.ndarray, new_depth: int, order: int) -> np.ndarray:
    depth, *plane = volume.shape
    if depth == new_depth:
        return volume
    lines = volume.reshape(depth, -1)
    out = np.empty((new_depth, lines.shape[1]), np.float32)
    width = max(1, _PIECE // depth)
    for start in range(0, lines.shape[1], width):
        piece = lines[:, start : start + width].astype(np.float64)
        for rows, columns, weights in _operator(depth, new_depth, order):
            out[rows, start : start + width] = weights @ piece[columns]
    return out.reshape(new_depth, *plane)


@lru_cache(maxsize=32)
def _operator(size: int, new_size: int, order: int) -> tuple[tuple[slice, slice, np.ndarray], ...]:
    """Resampling of one axis as blocks (output positions, input positions, weights) of a banded matrix."""
    matrix = ndimage.zoom(np.eye(size), (new_size / size, 1), order=order, mode="nearest", grid_mode=True)
    matrix[np.abs(matrix) < _BAND_TOLERANCE] = 0
    blocks = []
    for start in range(0, new_size, _BLOCK):
        rows = slice(start, min(start + _BLOCK, new_size))
        used = np.flatnonzero(matrix[rows].any(axis=0))
        columns = slice(int(used[0]), int(used[-1]) + 1)
        blocks.append((rows, columns, np.ascontiguousarray(matrix[rows, columns])))
    return tuple(blocks)


# ----------------------------------------------------------------------------------------------------------- label maps


class _Taps(NamedTuple):
    """Where the output positions of one axis fall between input positions."""

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray  # of `high`; `low` has 1 - weight
    nearest: np.ndarray


def _taps(size: int, new_size: int) -> _Taps:
    # The order of operations is scipy's, so that exact ties between labels are exact ties here too.
    position = np.clip((np.arange(new_size) + 0.5) * (size / new_size) - 0.5, 0, size - 1)
    low = np.floor(position).astype(np.intp)
    nearest = np.floor(position + 0.5).astype(np.intp)
    return _Taps(low, np.minimum(low + 1, size - 1), position - low, nearest)


def resample_segmentation(
    seg: Integer[np.ndarray, "c d h w"], new_shape: Size, spacing: Spacing, new_spacing: Spacing, order: int = 1
) -> Integer[np.ndarray, "c d2 h2 w2"]:
    """Resample label maps to `new_shape`; order 0 takes the nearest voxel.

    Order 1: the indicator of each label is interpolated linearly and the label with the largest score wins. Exact
    ties go to the label of the nearest voxel if it is among the tied ones, else to the lowest tied label. Along a
    coarse axis (`coarse_axis`) slices are taken by nearest neighbour.
    """
    if seg.shape[1:] == tuple(new_shape):
        return seg
    taps = [_taps(n, new) for n, new in zip(seg.shape[1:], new_shape, strict=True)]
    axis = coarse_axis(spacing, new_spacing)
    for a in range(3):
        if order == 0 or a == axis:
            nearest = taps[a].nearest
            taps[a] = _Taps(nearest, nearest, np.zeros(len(nearest)), nearest)
    return np.stack([_vote(channel, taps) for channel in seg])


def _vote(labels: np.ndarray, taps: list[_Taps]) -> np.ndarray:
    """Linear interpolation of all indicators at once, plane by plane; see `resample_segmentation`."""
    first, rows, columns = taps
    corners = [(r[:, None], c[None, :]) for r in (rows.low, rows.high) for c in (columns.low, columns.high)]

    @lru_cache(maxsize=2)
    def corners_of(plane: int) -> list[np.ndarray]:
        return [labels[plane][corner] for corner in corners]

    out = np.empty([len(t.low) for t in taps], labels.dtype)
    for i in range(len(out)):
        neighbours = corners_of(int(first.low[i])) + corners_of(int(first.high[i]))
        out[i] = neighbours[0]
        mixed = np.zeros(out[i].shape, bool)
        for other in neighbours[1:]:
            mixed |= other != neighbours[0]
        y, x = np.nonzero(mixed)
        if len(y):
            out[i, y, x] = _winner(
                np.stack([n[y, x] for n in neighbours]),
                [np.full(len(y), first.weight[i]), rows.weight[y], columns.weight[x]],
                labels[first.nearest[i], rows.nearest[y], columns.nearest[x]],
            )
    return out


def _winner(neighbours: np.ndarray, weights: list[np.ndarray], nearest: np.ndarray) -> np.ndarray:
    """Label of the largest summed weight among 8 neighbours (8, n), with the tie rule of `resample_segmentation`."""
    w0, w1, w2 = ((1 - w, w) for w in weights)
    corner_weights = [a * b * c for a in w0 for b in w1 for c in w2]
    scores = np.zeros(neighbours.shape)
    nearest_score = np.zeros(nearest.shape)
    for neighbour, weight in zip(neighbours, corner_weights, strict=True):
        scores += np.where(neighbours == neighbour, weight, 0)
        nearest_score += np.where(nearest == neighbour, weight, 0)
    best = scores.max(axis=0)
    lowest_tied = np.where(scores == best, neighbours, np.iinfo(neighbours.dtype).max).min(axis=0)
    return np.where(nearest_score == best, nearest, lowest_tied)
