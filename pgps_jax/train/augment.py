"""Augmentation of patches inside the compiled training step: policy, random parameters and the pipeline.

The rules are nnU-Net's default training pipeline: rotation, scaling, noise, blur, brightness, contrast, low resolution,
gamma and mirroring. The host only crops; what it must crop for a patch is `crop_size`. Usable alone:

>>> import jax, jax.numpy as jnp
>>> policy = make_policy(AugmentConfig(), planned_patch=(32, 32, 32))
>>> crop_size(policy, (16, 16, 16))  # larger than the patch, so that a turned patch is still filled
(25, 25, 25)
>>> image, label = jnp.ones((2, 25, 25, 25, 1)), jnp.zeros((2, 25, 25, 25), jnp.int8)
>>> apply = jax.jit(lambda key, image, label: augment(key, image, label, policy, (16, 16, 16)))
>>> image, label = apply(jax.random.key(0), image, label)
>>> image.shape, label.shape, str(image.dtype), str(label.dtype)
((2, 16, 16, 16, 1), (2, 16, 16, 16), 'float32', 'int8')

What differs from nnU-Net on purpose: rotation range and pseudo-2D are decided once, from the planned patch, so that
they do not flip while a curriculum grows the patch (`per_stage` gives the authors' behaviour), and every sample has its
own random key, so that a batch can be made again in any layout.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pgps_jax.architecture import Size
from pgps_jax.data.label_pairs import inner_pairs, label_pairs, swapped_outputs
from pgps_jax.data.labels import Labels
from pgps_jax.errors import InputError
from pgps_jax.train import intensity, spatial

Preset = Literal["default", "light", "none"]


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to training patches."""

    preset: Preset = "default"
    """default: nnU-Net's whole set. light: without rotation, scaling, blur and low resolution, so that no larger crop
    is read. none: patches as they are."""
    mirror: Literal["axes", "label-swap", "none"] = "axes"
    """axes: flip every axis at random. label-swap: the same, but a left-right flip exchanges left and right labels, in
    training and in test-time mirroring. none: do not flip, neither in training nor at test time."""
    label_pairs: tuple[tuple[int, int], ...] = ()
    """For label-swap: pairs of values in the label files (left, right). Found by the labels' names when not given."""
    left_right_axis: int | None = None
    """For label-swap: axis (0, 1 or 2, after the plan's transpose) from left to right. From the images if not given."""
    per_stage: bool = False
    """Decide rotation range and pseudo-2D from each stage's patch, as the PGPS authors do, not from the planned one."""


@dataclass(frozen=True)
class AugmentPolicy:
    """All that is fixed about augmentation; hashable, so that it can be a static argument. Made by `make_policy`.

    Fields named p_* are probabilities per sample. One that is 0 leaves its transform out of the program.
    """

    max_angle: float  # radians, of rotation around each axis
    planar: bool  # rotate and scale only within (h, w): pseudo-2D and 2D
    per_stage: bool = False  # decide max_angle and planar from the patch at hand instead
    p_rotation: float = 0.2
    p_scale: float = 0.2
    scale: tuple[float, float] = (0.7, 1.4)  # above 1 objects get smaller
    p_noise: float = 0.1
    noise_std: tuple[float, float] = (0.0, 0.1)
    p_blur: float = 0.2
    p_blur_channel: float = 0.5
    blur_sigma: tuple[float, float] = (0.5, 1.0)  # voxels, per channel and axis; at most 1
    p_brightness: float = 0.15
    brightness: tuple[float, float] = (0.75, 1.25)
    p_contrast: float = 0.15
    contrast: tuple[float, float] = (0.75, 1.25)
    p_low_resolution: float = 0.25
    p_low_resolution_channel: float = 0.5
    zoom: tuple[float, float] = (0.5, 1.0)
    p_gamma_inverted: float = 0.1
    p_gamma: float = 0.3
    gamma: tuple[float, float] = (0.7, 1.5)
    p_mirror: float = 0.5  # per axis
    mirror_axes: tuple[int, ...] = (0, 1, 2)
    swap_axis: int | None = None  # a flip of this axis exchanges the labels of swap_pairs
    swap_pairs: tuple[tuple[int, int], ...] = ()
    masked_channels: tuple[int, ...] = ()  # set to 0 where the label is -1, last of all

    @property
    def is_spatial(self) -> bool:
        """Whether patches are rotated or scaled, for which the host must cut more than the patch."""
        return self.p_rotation > 0 or self.p_scale > 0


class Parameters(NamedTuple):
    """Random numbers of one sample: which transforms fire, and with what. `c` values where they are per channel."""

    rotate: Bool[Array, ""]
    rescale: Bool[Array, ""]
    angles: Float[Array, "3"]
    scale: Float[Array, ""]
    noise: Bool[Array, ""]
    noise_std: Float[Array, ""]
    blur: Bool[Array, ""]
    blur_channels: Bool[Array, " c"]
    blur_sigma: Float[Array, "c 3"]
    brighten: Bool[Array, ""]
    brightness: Float[Array, " c"]
    stretch: Bool[Array, ""]
    contrast: Float[Array, " c"]
    lower_resolution: Bool[Array, ""]
    zoom: Float[Array, " c"]  # 1 for channels that are not chosen
    curve_inverted: Bool[Array, ""]
    gamma_inverted: Float[Array, " c"]
    curve: Bool[Array, ""]
    gamma: Float[Array, " c"]
    flips: Bool[Array, "3"]


def rotation_range(patch_size: Size) -> tuple[float, bool]:
    """Largest angle (radians) and whether to stay within (h, w), from the patch's shape (nnU-Net's rule).

    3D: 30 degrees around every axis; a patch more than three times as long as its first axis is treated slice by slice
    and turned freely. 2D (first axis 1): freely, or 15 degrees when one side is more than 1.5 times the other.
    """
    d, h, w = patch_size
    if d == 1:
        return (math.pi / 12 if max(h, w) / min(h, w) > 1.5 else math.pi), True
    return (math.pi, True) if max(patch_size) / d > 3 else (math.pi / 6, False)


def make_policy(
    config: AugmentConfig,
    planned_patch: Size,
    *,
    masked_channels: Sequence[int] = (),
    labels: Labels | None = None,
    left_right_axis: int | None = None,
) -> AugmentPolicy:
    """The policy of a whole run.

    Args:
        planned_patch: decides rotation range, pseudo-2D and mirror axes.
        masked_channels: channels that were normalised within a mask (the plan's use_mask_for_norm).
        labels: the dataset's labels, whose names tell the left/right pairs for label-swap.
        left_right_axis: axis of the transposed arrays that runs from left to right, for label-swap
            (`data.label_pairs.left_right_axis` finds it).

    Raises:
        InputError: label-swap without pairs or without axis, or with regions whose mirror image is none.
    """
    max_angle, planar = rotation_range(planned_patch)
    axes = (1, 2) if planned_patch[0] == 1 else (0, 1, 2)
    off = {"p_rotation": 0.0, "p_scale": 0.0, "p_blur": 0.0, "p_low_resolution": 0.0}
    if config.preset == "none":
        off |= {"p_noise": 0.0, "p_brightness": 0.0, "p_contrast": 0.0, "p_gamma_inverted": 0.0, "p_gamma": 0.0}
    swap_axis, swap_pairs = None, ()
    if config.preset == "none" or config.mirror == "none":
        axes = ()
    elif config.mirror == "label-swap":
        swap_axis = left_right_axis if config.left_right_axis is None else config.left_right_axis
        given = inner_pairs(labels, config.label_pairs) if labels else config.label_pairs
        swap_pairs = given or (label_pairs(labels) if labels else ())
        if not swap_pairs:
            raise InputError("augment.mirror label-swap: no label names form left/right pairs; "
                             "give the pairs as augment.label-pairs, or mirror axes or none")
        if swap_axis not in (0, 1, 2):
            raise InputError(f"augment.mirror label-swap: left-right axis {swap_axis} is not 0, 1 or 2; "
                             "give it as augment.left-right-axis")
        if labels:
            swapped_outputs(labels, swap_pairs)  # refuses what could not be swapped back at test time
    return AugmentPolicy(
        max_angle, planar, config.per_stage, **({} if config.preset == "default" else off), mirror_axes=axes,
        swap_axis=swap_axis, swap_pairs=tuple(swap_pairs), masked_channels=tuple(masked_channels),
    )


def _geometry(policy: AugmentPolicy, patch_size: Size) -> tuple[float, bool]:
    """Largest angle and planarity that hold for this patch."""
    return rotation_range(patch_size) if policy.per_stage else (policy.max_angle, policy.planar)


def crop_size(policy: AugmentPolicy, patch_size: Size) -> Size:
    """What the host must cut for a patch: the patch, or more when it may be turned and scaled (nnU-Net's rule).

    The patch turned by the largest angle (at most 90 degrees) around one axis at a time still fits, divided by 0.85
    although scales down to 0.7 are drawn; corners can therefore see the zeros around the crop.
    """
    if not policy.is_spatial:
        return patch_size
    max_angle, planar = _geometry(policy, patch_size)
    angle = min(max_angle, math.pi / 2)
    c, s = math.cos(angle), math.sin(angle)
    d, h, w = patch_size
    if d == 1 and planar:
        d = 0  # 2D: the formulas for (h, w) alone
    sizes = (
        max(d, abs(d * c - w * s), d * c + h * s),
        max(h, h * c + w * s, abs(h * c - d * s)),
        max(w, abs(w * c - h * s), d * s + w * c),
    )
    crop = tuple(int(size / 0.85) for size in sizes)
    return (patch_size[0], *crop[1:]) if planar else crop


NUM_ROWS = 31  # uniform numbers per channel that `draw_parameters` uses


def draw_parameters(key: Key[Array, ""], policy: AugmentPolicy, max_angle: float, channels: int) -> Parameters:
    """The random numbers of one sample, all from one draw of uniform numbers."""
    width = max(channels, 3)
    rows = iter(jax.random.uniform(key, (NUM_ROWS * width,)).reshape(NUM_ROWS, width))  # drawn flat: compiles faster

    def fires(probability: float) -> Bool[Array, ""]:
        return next(rows)[0] < probability

    def chosen(probability: float) -> Bool[Array, " c"]:
        return next(rows)[:channels] < probability

    def between(limits: tuple[float, float], n: int) -> Float[Array, " n"]:
        return limits[0] + (limits[1] - limits[0]) * next(rows)[:n]

    def around_one(limits: tuple[float, float]) -> Float[Array, " c"]:
        """Below and above 1 equally often, whatever the limits."""
        below, above = (min(limits[0], 1.0), 1.0), (max(limits[0], 1.0), limits[1])
        return jnp.where(chosen(0.5 if limits[0] < 1 else 0.0), between(below, channels), between(above, channels))

    rotate, rescale = fires(policy.p_rotation), fires(policy.p_scale)
    return Parameters(
        rotate=rotate,
        rescale=rescale,
        angles=jnp.where(rotate, between((-max_angle, max_angle), 3), 0.0),
        scale=jnp.where(rescale, between(policy.scale, 1)[0], 1.0),
        noise=fires(policy.p_noise),
        noise_std=between(policy.noise_std, 1)[0],
        blur=fires(policy.p_blur),
        blur_channels=chosen(policy.p_blur_channel),
        blur_sigma=jnp.stack([between(policy.blur_sigma, channels) for _ in range(3)], axis=1),
        brighten=fires(policy.p_brightness),
        brightness=around_one(policy.brightness),
        stretch=fires(policy.p_contrast),
        contrast=around_one(policy.contrast),
        lower_resolution=fires(policy.p_low_resolution),
        zoom=jnp.where(chosen(policy.p_low_resolution_channel), between(policy.zoom, channels), 1.0),
        curve_inverted=fires(policy.p_gamma_inverted),
        gamma_inverted=around_one(policy.gamma),
        curve=fires(policy.p_gamma),
        gamma=around_one(policy.gamma),
        flips=next(rows)[:3] < policy.p_mirror,
    )


def augment(
    key: Key[Array, ""],
    image: Float[Array, "b d h w c"],
    label: Int[Array, "b d h w"],
    policy: AugmentPolicy,
    patch_size: Size,
) -> tuple[Float[Array, "b pd ph pw c"], Int[Array, "b pd ph pw"]]:
    """Augment a batch of crops of `crop_size(policy, patch_size)`; the patches come out as float32 and without -1.

    Sample i depends on `fold_in(key, 2 i)`, `fold_in(key, 2 i + 1)` and its own voxels only. On CPU samples are treated
    one after the other, and a transform that does not fire costs nothing; elsewhere all of them at once, which fills a
    large device better.
    """
    channels = image.shape[-1]
    max_angle, planar = _geometry(policy, patch_size)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(2 * image.shape[0])).reshape(-1, 2)

    def one(keys: Array, image: Array, label: Array) -> tuple[Array, Array]:
        key, noise_key = keys
        parameters = draw_parameters(key, policy, max_angle, channels)
        image = jnp.moveaxis(image, -1, 0)
        image, label = apply_parameters(noise_key, parameters, image, label, policy, patch_size, planar)
        return jnp.moveaxis(image, 0, -1), label

    return jax.lax.platform_dependent(
        keys, image, label, cpu=lambda *batch: jax.lax.map(lambda sample: one(*sample), batch), default=jax.vmap(one)
    )


def apply_parameters(
    noise_key: Key[Array, ""],
    parameters: Parameters,
    image: Float[Array, "c d h w"],
    label: Int[Array, "d h w"],
    policy: AugmentPolicy,
    patch_size: Size,
    planar: bool,
) -> tuple[Float[Array, "c pd ph pw"], Int[Array, "pd ph pw"]]:
    """The pipeline for one sample, in nnU-Net's order, with given parameters."""
    p = parameters

    def crop() -> tuple[Array, Array]:
        x, y = spatial.centre_crop(image, label, patch_size)
        return x.astype(jnp.float32), y

    def turn() -> tuple[Array, Array]:
        matrix = spatial.affine_matrix(p.angles, p.scale, planar)
        return spatial.resample_affine(image, label, matrix, patch_size, planar)

    def maybe(probability: float, fires: Array, transform: Callable[[Array], Array], x: Array) -> Array:
        return jax.lax.cond(fires, transform, lambda x: x, x) if probability > 0 else x

    x, y = jax.lax.cond(p.rotate | p.rescale, turn, crop) if policy.is_spatial else crop()
    x = maybe(policy.p_noise, p.noise, lambda x: intensity.gaussian_noise(noise_key, x, p.noise_std), x)
    x = maybe(policy.p_blur, p.blur, lambda x: intensity.gaussian_blur(x, p.blur_sigma, p.blur_channels), x)
    x = maybe(policy.p_brightness, p.brighten, lambda x: intensity.brightness(x, p.brightness), x)
    x = maybe(policy.p_contrast, p.stretch, lambda x: intensity.contrast(x, p.contrast), x)
    zoomed = (1, 2) if planar else (0, 1, 2)
    x = maybe(policy.p_low_resolution, p.lower_resolution, lambda x: intensity.low_resolution(x, p.zoom, zoomed), x)
    if policy.p_gamma_inverted > 0 or policy.p_gamma > 0:  # the same code twice: a loop halves its compilation
        fires, exponents = jnp.stack([p.curve_inverted, p.curve]), jnp.stack([p.gamma_inverted, p.gamma])

        def curve(x: Array, draw: tuple[Array, Array, Array]) -> tuple[Array, None]:
            fires, exponent, inverted = draw
            return maybe(1.0, fires, lambda x: intensity.gamma(x, exponent, inverted), x), None

        x, _ = jax.lax.scan(curve, x, (fires, exponents, jnp.array([True, False])))
    x, y = spatial.mirror(x, y, p.flips, policy.mirror_axes, policy.swap_axis, policy.swap_pairs)
    if policy.masked_channels:
        x = intensity.mask_outside(x, y, policy.masked_channels)
    return x, jnp.maximum(y, 0)
