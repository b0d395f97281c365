"""Swin UNETR: shifted-window attention as encoder, convolutions as decoder, as in MONAI 1.6.

Hatamizadeh et al. 2022; with `v2`, He et al. 2023: a residual convolution block before each stage of the encoder. Attribute
paths are MONAI's parameter names.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pgps_jax.architecture import Architecture, PatchLimits, Size
from pgps_jax.errors import InputError
from pgps_jax.models.attention import (
    LayerNorm,
    Linear,
    PatchEmbedding,
    Perceptron,
    attend,
    from_windows,
    layer_norm,
    to_windows,
)
from pgps_jax.models.blocks import recomputed
from pgps_jax.models.unetr import BasicBlock, Head, UpBlock, check_divisible, read_options

_MASKED = -100.0  # added to the logits of tokens that only the cyclic shift has made neighbours

# Order in which the eight neighbours (offsets along d, h, w) are concatenated, which the parameters depend on
_MERGING = {
    "merging": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    "mergingv2": tuple(np.ndindex(2, 2, 2)),
}


@dataclass(frozen=True)
class SwinUnetrOptions:
    """Options of the architecture, with MONAI's defaults."""

    feature_size: int = 24
    """Channels at full resolution, a multiple of 12; doubled at each coarser level."""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """Transformer blocks of the four stages."""
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    """Attention heads of the four stages."""
    window_size: int | Size = 7
    """Tokens per window and axis; stages with fewer tokens are one window."""
    qkv_bias: bool = True
    """Give queries, keys and values a bias."""
    mlp_ratio: float = 4.0
    """Hidden channels of the perceptrons per channel."""
    downsample: Literal["merging", "mergingv2"] = "merging"
    """Order of neighbours when tokens are merged: "merging" or "mergingv2"."""
    v2: bool = False
    """A residual convolution block before each stage (SwinUNETR-V2)."""


class SwinUnetr(nnx.Module):
    """Logits at full resolution only: the architecture has no deep supervision."""

    def __init__(
        self, options: SwinUnetrOptions, in_channels: int, out_channels: int, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs
    ):
        f, kwargs = options.feature_size, {"dtype": dtype, "rngs": rngs}
        self.remat = remat
        self.swinViT = SwinTransformer(options, in_channels, remat=remat, **kwargs)
        self.encoder1 = BasicBlock(in_channels, f, **kwargs)
        self.encoder2 = BasicBlock(f, f, **kwargs)
        self.encoder3 = BasicBlock(2 * f, 2 * f, **kwargs)
        self.encoder4 = BasicBlock(4 * f, 4 * f, **kwargs)
        self.encoder10 = BasicBlock(16 * f, 16 * f, **kwargs)
        self.decoder5 = UpBlock(16 * f, 8 * f, **kwargs)
        self.decoder4 = UpBlock(8 * f, 4 * f, **kwargs)
        self.decoder3 = UpBlock(4 * f, 2 * f, **kwargs)
        self.decoder2 = UpBlock(2 * f, f, **kwargs)
        self.decoder1 = UpBlock(f, f, **kwargs)
        self.out = Head(f, out_channels, **kwargs)

    def __call__(self, x: Float[Array, "b d h w c"], deep_supervision: bool = True) -> tuple[Array]:
        """Logits (b, d, h, w, classes) in float32, a tuple of one whether deep supervision is on or not."""
        check_divisible("swin-unetr", x.shape[1:4], 32)
        half, quarter, eighth, sixteenth, lowest = self.swinViT(x)
        run = functools.partial(recomputed, remat=self.remat)
        y = run(self.decoder5)(run(self.encoder10)(lowest), sixteenth)
        y = run(self.decoder4)(y, run(self.encoder4)(eighth))
        y = run(self.decoder3)(y, run(self.encoder3)(quarter))
        y = run(self.decoder2)(y, run(self.encoder2)(half))
        y = run(self.decoder1)(y, run(self.encoder1)(x))
        return (self.out(y),)


class SwinTransformer(nnx.Module):
    """Tokens of 2 x 2 x 2 voxels and four stages, each of which halves the resolution and doubles the channels."""

    def __init__(self, options: SwinUnetrOptions, in_channels: int, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs):
        f, kwargs = options.feature_size, {"dtype": dtype, "rngs": rngs}
        # MONAI keeps the embedding's convolution under this name
        self.patch_embed = nnx.Dict(proj=PatchEmbedding(in_channels, f, (2, 2, 2), rngs=rngs))
        for i in range(4):
            setattr(self, f"layers{i + 1}", nnx.List([SwinStage(options, i, remat=remat, **kwargs)]))
            if options.v2:
                setattr(self, f"layers{i + 1}c", nnx.List([BasicBlock(f * 2**i, f * 2**i, **kwargs)]))
        self.v2 = options.v2
        self.remat = remat
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b d h w ci"]) -> list[Array]:
        """Five volumes from half resolution on, normed over channels."""
        x = self.patch_embed["proj"](x)  # tokens stay float32; only what is computed from them need not
        outputs = [layer_norm(x).astype(self.dtype)]
        for i in range(1, 5):
            if self.v2:
                x = recomputed(getattr(self, f"layers{i}c")[0], self.remat)(x)
            x = getattr(self, f"layers{i}")[0](x)
            outputs.append(layer_norm(x).astype(self.dtype))
        return outputs


class SwinStage(nnx.Module):
    """Transformer blocks, every second one on shifted windows; then tokens are merged."""

    def __init__(self, options: SwinUnetrOptions, index: int, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs):
        features, heads = options.feature_size * 2**index, options.num_heads[index]
        self.blocks = nnx.List(
            SwinBlock(options, features, heads, shifted=bool(i % 2), dtype=dtype, rngs=rngs)
            for i in range(options.depths[index])
        )
        self.downsample = TokenMerging(features, options.downsample, dtype=dtype, rngs=rngs)
        self.remat = remat

    def __call__(self, x: Float[Array, "b d h w c"]) -> Float[Array, "b do ho wo co"]:
        for block in self.blocks:
            x = recomputed(block, self.remat)(x)
        return self.downsample(x)


class SwinBlock(nnx.Module):
    """Attention within windows, then a perceptron, each after a norm and beside a skip.

    Windows shrink to the volume where it has fewer tokens, and are then not shifted along that axis. A volume that is no
    multiple of the window is padded with zeros, which tokens attend to as in MONAI.
    """

    def __init__(
        self,
        options: SwinUnetrOptions,
        features: int,
        num_heads: int,
        *,
        shifted: bool,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.window = _triple(options.window_size)
        self.shifted = shifted
        self.dtype = dtype
        self.norm1 = LayerNorm(features)
        self.attn = WindowAttention(features, num_heads, self.window, options.qkv_bias, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(features)
        self.mlp = Perceptron(features, int(features * options.mlp_ratio), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b d h w c"]) -> Float[Array, "b d h w c"]:
        x = x + self.attend_in_windows(self.norm1(x).astype(self.dtype))
        return x + self.mlp(self.norm2(x))

    def attend_in_windows(self, x: Float[Array, "b d h w c"]) -> Float[Array, "b d h w c"]:
        """Pad, shift cyclically, attend, and undo both."""
        d, h, w = x.shape[1:4]
        window = tuple(min(n, size) for n, size in zip((d, h, w), self.window, strict=True))
        shift = tuple(
            size // 2 if self.shifted and n > size else 0 for n, size in zip((d, h, w), self.window, strict=True)
        )
        x = jnp.pad(x, [(0, 0), *((0, -n % size) for n, size in zip((d, h, w), window, strict=True)), (0, 0)])
        shape = x.shape[1:4]
        if any(shift):
            x = jnp.roll(x, [-s for s in shift], axis=(1, 2, 3))
        x = self.attn(to_windows(x, window), _regions(shape, window, shift) if any(shift) else None)
        x = from_windows(x, window, shape)
        if any(shift):
            x = jnp.roll(x, shift, axis=(1, 2, 3))
        return x[:, :d, :h, :w]


class WindowAttention(nnx.Module):
    """Attention within windows, with a learnt bias for each relative position and head."""

    def __init__(
        self, features: int, num_heads: int, window: Size, qkv_bias: bool, *, dtype=jnp.float32, rngs: nnx.Rngs
    ):
        positions = int(np.prod([2 * size - 1 for size in window]))
        self.relative_position_bias_table = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (positions, num_heads))
        )
        self.qkv = Linear(features, 3 * features, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = Linear(features, features, dtype=dtype, rngs=rngs)
        self.window = window
        self.num_heads = num_heads

    def __call__(
        self, x: Float[Array, "b windows n c"], regions: np.ndarray | None = None
    ) -> Float[Array, "b windows n c"]:
        """`regions` (windows, n): tokens of a window attend to each other only within a region; None: all do."""
        n = x.shape[2]
        # A shrunken window takes the first n positions of the full one, whatever its shape: so does MONAI
        bias = self.position_bias()[:n, :n].transpose(2, 0, 1)
        if regions is not None:
            regions = jax.lax.optimization_barrier(jnp.asarray(regions))  # or XLA stores the mask, often gigabytes
            apart = regions[:, :, None] != regions[:, None, :]
            bias = bias + jnp.where(apart, _MASKED, 0.0)[:, None]
        return self.proj(attend(self.qkv(x), self.num_heads, bias))

    def position_bias(self) -> Float[Array, "n n heads"]:
        """Bias of each (query, key) of a full window.

        The table is spread by products with 0/1 matrices, one axis at a time: their gradient is a product again, where
        that of an index would be a scatter, slow and in no fixed order on GPUs.
        """
        table = self.relative_position_bias_table[...].reshape(*(2 * size - 1 for size in self.window), -1)
        for axis, size in enumerate(self.window):
            difference = np.subtract.outer(np.arange(size), np.arange(size)) + size - 1
            spread = (difference.reshape(-1, 1) == np.arange(2 * size - 1)).astype(table.dtype)
            table = jnp.moveaxis(jnp.tensordot(spread, table, axes=(1, axis), precision="highest"), 0, axis)
        return to_windows(table[None], self.window)[0]


class TokenMerging(nnx.Module):
    """Eight neighbouring tokens to one of twice the channels: concatenate, norm, project."""

    def __init__(self, features: int, order: str, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.norm = LayerNorm(8 * features)
        self.reduction = Linear(8 * features, 2 * features, use_bias=False, dtype=dtype, rngs=rngs)
        self.order = tuple(4 * d + 2 * h + w for d, h, w in _MERGING[order])

    def __call__(self, x: Float[Array, "b d h w c"]) -> Float[Array, "b do ho wo co"]:
        b, d, h, w, c = x.shape
        blocks = to_windows(x, (2, 2, 2))
        x = jnp.concatenate([blocks[:, :, neighbour] for neighbour in self.order], axis=-1)
        x = self.reduction(self.norm(x)).astype(x.dtype)
        return x.reshape(b, d // 2, h // 2, w // 2, 2 * c)


def build_swin_unetr(
    architecture: Architecture, in_channels: int, out_channels: int, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs
) -> SwinUnetr:
    """MONAI's SwinUNETR; see SwinUnetrOptions for `architecture.options`."""
    return SwinUnetr(swin_unetr_options(architecture), in_channels, out_channels, dtype=dtype, remat=remat, rngs=rngs)


def swin_unetr_options(architecture: Architecture) -> SwinUnetrOptions:
    """The options of an architecture, checked."""
    order = architecture.options.get("downsample", "merging")
    if order not in _MERGING:
        raise InputError(f"swin-unetr: downsample '{order}' is none of {', '.join(_MERGING)}.")
    options = read_options(SwinUnetrOptions, architecture)
    if options.feature_size % 12:
        raise InputError(f"swin-unetr: feature_size {options.feature_size} must be a multiple of 12.")
    if len(options.depths) != 4 or len(options.num_heads) != 4:
        raise InputError("swin-unetr: depths and num_heads need one number for each of the four stages.")
    if any(options.feature_size * 2**i % heads for i, heads in enumerate(options.num_heads)):
        raise InputError(
            f"swin-unetr: num_heads {options.num_heads} must divide the channels of their stages, which are feature_size "
            f"{options.feature_size} times 1, 2, 4 and 8."
        )
    return options


def swin_unetr_limits(architecture: Architecture) -> PatchLimits:
    """Multiples of 32, from 32 on.

    At 32 voxels on all axes the bottleneck is one voxel. Its instance norms give zero there: `encoder10` passes its input on by
    the skip and its two convolutions get no gradient until a later stage; everything else learns. (PyTorch refuses to
    norm one voxel, so MONAI itself starts one axis later, at 64.) A U-Net's smallest stage in PGPS 2025 is of this kind too.
    """
    swin_unetr_options(architecture)
    return PatchLimits((32, 32, 32), (32, 32, 32))


def _triple(window: int | Size) -> Size:
    return (window,) * 3 if isinstance(window, int) else tuple(window)


def _regions(shape: Size, window: Size, shift: Size) -> np.ndarray:
    """Which tokens belong together after a cyclic shift: region number of each token, cut into windows (windows, n)."""
    axes = []
    for size, win, moved in zip(shape, window, shift, strict=True):
        position = np.arange(size)
        axes.append((position >= size - win).astype(int) + (position >= size - moved))
    d, h, w = np.ix_(*axes)
    regions = (9 * d + 3 * h + w).astype(np.int8)
    return to_windows(regions[None, ..., None], window)[0, :, :, 0]
