"""UNETR: a vision transformer as encoder, convolutions as decoder (Hatamizadeh et al. 2022), as in MONAI 1.6.

Attribute paths are MONAI's parameter names. The blocks at the end of the file also build the decoder of Swin UNETR.
"""

import functools
import math
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pgps_jax.architecture import Architecture, PatchLimits, Size
from pgps_jax.errors import InputError
from pgps_jax.models.attention import LayerNorm, Linear, PatchEmbedding, Perceptron, attend, uniform
from pgps_jax.models.blocks import SLOPE, Conv, TransposedConv, recomputed
from pgps_jax.models.conv import instance_norm

_TOKEN = (16, 16, 16)  # voxels
_NUM_BLOCKS = 12


@dataclass(frozen=True)
class UnetrOptions:
    """Options of the architecture, with MONAI's defaults."""

    feature_size: int = 16
    """Channels at full resolution; doubled at each coarser level."""
    hidden_size: int = 768
    """Channels of a token."""
    mlp_dim: int = 3072
    """Hidden channels of the transformer's perceptrons."""
    num_heads: int = 12
    """Attention heads; a divisor of hidden_size."""
    qkv_bias: bool = False
    """Give queries, keys and values a bias."""
    table_size: Size | None = None
    """Patch in voxels for which positions are learnt (MONAI's img_size); the planned, largest patch when not given."""


class Unetr(nnx.Module):
    """Logits at full resolution only: the architecture has no deep supervision."""

    def __init__(
        self, options: UnetrOptions, in_channels: int, out_channels: int, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs
    ):
        f, hidden, kwargs = options.feature_size, options.hidden_size, {"dtype": dtype, "rngs": rngs}
        self.remat = remat
        self.vit = VisionTransformer(options, in_channels, remat=remat, **kwargs)
        self.encoder1 = BasicBlock(in_channels, f, **kwargs)
        self.encoder2 = ProjectUpBlock(hidden, 2 * f, 2, **kwargs)
        self.encoder3 = ProjectUpBlock(hidden, 4 * f, 1, **kwargs)
        self.encoder4 = ProjectUpBlock(hidden, 8 * f, 0, **kwargs)
        self.decoder5 = UpBlock(hidden, 8 * f, **kwargs)
        self.decoder4 = UpBlock(8 * f, 4 * f, **kwargs)
        self.decoder3 = UpBlock(4 * f, 2 * f, **kwargs)
        self.decoder2 = UpBlock(2 * f, f, **kwargs)
        self.out = Head(f, out_channels, **kwargs)

    def __call__(self, x: Float[Array, "b d h w c"], deep_supervision: bool = True) -> tuple[Array]:
        """Logits (b, d, h, w, classes) in float32, a tuple of one whether deep supervision is on or not."""
        check_divisible("unetr", x.shape[1:4], 16)
        third, sixth, ninth, last = self.vit(x)
        run = functools.partial(recomputed, remat=self.remat)
        y = run(self.decoder5)(last, run(self.encoder4)(ninth))
        y = run(self.decoder4)(y, run(self.encoder3)(sixth))
        y = run(self.decoder3)(y, run(self.encoder2)(third))
        y = run(self.decoder2)(y, run(self.encoder1)(x))
        return (self.out(y),)


class VisionTransformer(nnx.Module):
    """Twelve transformer blocks over all tokens of the patch."""

    def __init__(self, options: UnetrOptions, in_channels: int, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs):
        self.patch_embedding = PositionedEmbedding(options, in_channels, rngs=rngs)
        self.blocks = nnx.List(TransformerBlock(options, dtype=dtype, rngs=rngs) for _ in range(_NUM_BLOCKS))
        self.norm = LayerNorm(options.hidden_size)
        self.remat = remat

    def __call__(self, x: Float[Array, "b d h w ci"]) -> list[Array]:
        """Token volumes (b, d/16, h/16, w/16, hidden) after the blocks 4, 7 and 10, and the last one's normed."""
        x = self.patch_embedding(x)  # tokens stay float32; only what is computed from them need not
        shape = x.shape
        x = x.reshape(shape[0], -1, shape[-1])
        outputs = []
        for block in self.blocks:
            x = recomputed(block, self.remat)(x)
            outputs.append(x)
        return [y.reshape(shape) for y in (outputs[3], outputs[6], outputs[9], self.norm(x))]


class PositionedEmbedding(nnx.Module):
    """Tokens of 16 x 16 x 16 voxels plus the learnt table of their positions.

    The table covers a patch of `table_size` voxels. Other patches see it interpolated linearly (half-voxel centres,
    and a kernel widened to average where the patch is smaller, so that each position learns at each stage of a
    curriculum). At its own size it is added as it is, as in MONAI, which takes no other size.
    """

    def __init__(self, options: UnetrOptions, in_channels: int, *, rngs: nnx.Rngs):
        self.grid = tuple(n // t for n, t in zip(options.table_size, _TOKEN, strict=True))
        positions = (1, math.prod(self.grid), options.hidden_size)
        self.patch_embeddings = PatchEmbedding(in_channels, options.hidden_size, _TOKEN, rngs=rngs)
        self.position_embeddings = nnx.Param(0.02 * jax.random.normal(rngs.params(), positions))

    def __call__(self, x: Float[Array, "b d h w ci"]) -> Float[Array, "b do ho wo co"]:
        x = self.patch_embeddings(x)
        table = self.position_embeddings[...].reshape(*self.grid, -1)
        if self.grid != x.shape[1:4]:
            table = jax.image.resize(table, x.shape[1:], "linear")
        return x + table


class TransformerBlock(nnx.Module):
    """Attention among all tokens, then a perceptron, each after a norm and beside a skip."""

    def __init__(self, options: UnetrOptions, *, dtype=jnp.float32, rngs: nnx.Rngs):
        hidden = options.hidden_size
        self.norm1 = LayerNorm(hidden)
        self.attn = SelfAttention(hidden, options.num_heads, options.qkv_bias, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(hidden)
        self.mlp = Perceptron(hidden, options.mlp_dim, dtype=dtype, rngs=rngs)
        self.norm_cross_attn = LayerNorm(hidden)  # never used; MONAI has it in every checkpoint

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SelfAttention(nnx.Module):
    """Multi-head attention and its projections."""

    def __init__(self, features: int, num_heads: int, qkv_bias: bool, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.qkv = Linear(features, 3 * features, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.out_proj = Linear(features, features, dtype=dtype, rngs=rngs)
        self.num_heads = num_heads

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return self.out_proj(attend(self.qkv(x), self.num_heads))


def build_unetr(
    architecture: Architecture, in_channels: int, out_channels: int, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs
) -> Unetr:
    """MONAI's UNETR; see UnetrOptions for `architecture.options`."""
    options = unetr_options(architecture)
    if options.table_size is None:
        raise InputError("unetr: the option table_size is missing; it is the patch in voxels for which positions are learnt.")
    return Unetr(options, in_channels, out_channels, dtype=dtype, remat=remat, rngs=rngs)


def unetr_limits(architecture: Architecture) -> PatchLimits:
    """One token more at a time, from a single token on (no norm sees fewer than 2 x 2 x 2 voxels)."""
    unetr_options(architecture)
    return PatchLimits(_TOKEN, _TOKEN)


def unetr_options(architecture: Architecture) -> UnetrOptions:
    """The options of an architecture, checked."""
    options = read_options(UnetrOptions, architecture)
    if options.hidden_size % options.num_heads:
        raise InputError(
            f"unetr: hidden_size {options.hidden_size} must be a multiple of num_heads {options.num_heads}; change one."
        )
    if options.table_size is not None:
        check_divisible("unetr option table_size", options.table_size, 16)
    return options


def read_options(kind: type, architecture: Architecture):
    """The options of an architecture as `kind`; lists, as JSON has them, become tuples. InputError for odd values."""
    known = [field.name for field in fields(kind)]
    unknown = sorted(set(architecture.options) - set(known))
    if unknown:
        raise InputError(
            f"Backbone '{architecture.backbone}' has no option {', '.join(unknown)}; it has: {', '.join(known)}."
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in architecture.options.items()}
    for name, value in values.items():
        if not _is_like(value, getattr(kind, name)):
            raise InputError(f"{architecture.backbone}: option {name} is {value!r}; want a value like {getattr(kind, name)!r}, above 0.")
    return kind(**values)


def _is_like(value: object, default: object) -> bool:
    """Whether a value is of the default's kind, numbers positive; several numbers may stand where one does, or nothing."""
    if isinstance(default, bool | str):
        return type(value) is type(default)
    numbers = value if isinstance(value, tuple) else () if isinstance(default, tuple) else (value,)
    return bool(numbers) and all(type(n) is (float if isinstance(default, float) else int) and n > 0 for n in numbers)


def check_divisible(what: str, shape: Size, factor: int) -> None:
    """Raise an InputError unless every size is a positive multiple of `factor`."""
    if any(n < 1 or n % factor for n in shape):
        raise InputError(f"{what}: {tuple(shape)} is not a multiple of {factor} on every axis; choose such a patch size.")


# ------------------------------------------------------------------------------------------- convolutional blocks


class Convolution(nnx.Module):
    """A convolution one level down, as MONAI's are, with PyTorch's initial weights."""

    def __init__(
        self, in_features: int, out_features: int, size: int, *, use_bias=False, dtype=jnp.float32, rngs: nnx.Rngs
    ):
        self.conv = Conv(in_features, out_features, (size,) * 3, use_bias=use_bias, dtype=dtype, rngs=rngs)
        fan_in = in_features * size**3
        self.conv.kernel = nnx.Param(uniform(rngs, self.conv.kernel.shape, fan_in))
        if use_bias:
            self.conv.bias = nnx.Param(uniform(rngs, (out_features,), fan_in))

    def __call__(self, x: Float[Array, "b d h w ci"]) -> Float[Array, "b d h w co"]:
        return self.conv(x)


class TransposedConvolution(nnx.Module):
    """Doubles the resolution; no bias."""

    def __init__(self, in_features: int, out_features: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.conv = TransposedConv(in_features, out_features, (2, 2, 2), use_bias=False, dtype=dtype, rngs=rngs)
        # PyTorch takes the fan-in of a transposed convolution from its output channels
        self.conv.kernel = nnx.Param(uniform(rngs, self.conv.kernel.shape, 8 * out_features))

    def __call__(self, x: Float[Array, "b d h w ci"]) -> Float[Array, "b d2 h2 w2 co"]:
        return self.conv(x)


class ResidualConvs(nnx.Module):
    """Two 3 x 3 x 3 convolutions beside a skip, which is projected where channels change.

    Instance norms have no parameters. Over a single voxel they give zero, so that there the block passes its skip on and its
    convolutions learn nothing.
    """

    def __init__(self, in_features: int, out_features: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.conv1 = Convolution(in_features, out_features, 3, dtype=dtype, rngs=rngs)
        self.conv2 = Convolution(out_features, out_features, 3, dtype=dtype, rngs=rngs)
        changes = in_features != out_features
        self.conv3 = Convolution(in_features, out_features, 1, dtype=dtype, rngs=rngs) if changes else None

    def __call__(self, x: Float[Array, "b d h w ci"]) -> Float[Array, "b d h w co"]:
        y = _norm(self.conv1(x), SLOPE)
        y = _norm(self.conv2(y))
        y = y + (x if self.conv3 is None else _norm(self.conv3(x)))
        return jnp.where(y > 0, y, SLOPE * y)


def _norm(x: Array, negative_slope: float | None = None) -> Array:
    features = x.shape[-1]
    return instance_norm(x, jnp.ones(features), jnp.zeros(features), negative_slope=negative_slope)


class BasicBlock(nnx.Module):
    """A residual block, under the name that MONAI gives it."""

    def __init__(self, in_features: int, out_features: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.layer = ResidualConvs(in_features, out_features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b d h w ci"]) -> Float[Array, "b d h w co"]:
        return self.layer(x)


class UpBlock(nnx.Module):
    """Double the resolution, concatenate [upsampled, skip], residual block."""

    def __init__(self, in_features: int, out_features: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.transp_conv = TransposedConvolution(in_features, out_features, dtype=dtype, rngs=rngs)
        self.conv_block = ResidualConvs(2 * out_features, out_features, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b d h w ci"], skip: Float[Array, "b d2 h2 w2 co"]
    ) -> Float[Array, "b d2 h2 w2 co"]:
        return self.conv_block(jnp.concatenate([self.transp_conv(x), skip], axis=-1))


class ProjectUpBlock(nnx.Module):
    """Double the resolution once, and then `num_blocks` times more, each time followed by a residual block."""

    def __init__(
        self, in_features: int, out_features: int, num_blocks: int, *, dtype=jnp.float32, rngs: nnx.Rngs
    ):
        kwargs = {"dtype": dtype, "rngs": rngs}
        self.transp_conv_init = TransposedConvolution(in_features, out_features, **kwargs)
        self.blocks = nnx.List(
            nnx.List(
                [
                    TransposedConvolution(out_features, out_features, **kwargs),
                    ResidualConvs(out_features, out_features, **kwargs),
                ]
            )
            for _ in range(num_blocks)
        )

    def __call__(self, x: Float[Array, "b d h w ci"]) -> Float[Array, "b do ho wo co"]:
        x = self.transp_conv_init(x)
        for upsample, convs in self.blocks:
            x = convs(upsample(x))
        return x


class Head(nnx.Module):
    """1 x 1 x 1 convolution to the classes, with bias; float32."""

    def __init__(self, in_features: int, out_channels: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.conv = Convolution(in_features, out_channels, 1, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b d h w ci"]) -> Float[Array, "b d h w co"]:
        return self.conv.conv.logits(x)
