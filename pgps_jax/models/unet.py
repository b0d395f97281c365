"""The plain U-Net of nnU-Net (PlainConvUNet), built from a planned architecture.

Attribute paths are nnU-Net's parameter names: `encoder.stages.{s}.0.convs.{c}`, `decoder.transpconvs.{d}`,
`decoder.stages.{d}.convs.{c}`, `decoder.seg_layers.{d}`, where d = 0 is the lowest resolution.
"""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pgps_jax.architecture import Architecture, PatchLimits, Size
from pgps_jax.models.blocks import Conv, ConvNormAct, TransposedConv, recomputed


class ConvStack(nnx.Module):
    """Convolution blocks one after the other; the first may have a stride."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_convs: int,
        kernel_size: Size,
        stride: Size = (1, 1, 1),
        *,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.convs = nnx.List(
            ConvNormAct(
                out_features if i else in_features,
                out_features,
                kernel_size,
                (1, 1, 1) if i else stride,
                dtype=dtype,
                rngs=rngs,
            )
            for i in range(num_convs)
        )

    def __call__(self, x: Float[Array, "b d h w ci"]) -> Float[Array, "b do ho wo co"]:
        for conv in self.convs:
            x = conv(x)
        return x


class PlainEncoder(nnx.Module):
    """Stacks of convolutions whose first one strides. Returns every stage's output, full resolution first."""

    def __init__(self, architecture: Architecture, in_channels: int, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs):
        a = architecture
        features = (in_channels, *a.features_per_stage)
        self.remat = remat
        self.stages = nnx.List(
            # nnU-Net wraps each stage in a sequence of one, which shows in its parameter names
            nnx.List([ConvStack(features[s], features[s + 1], n, kernel, stride, dtype=dtype, rngs=rngs)])
            for s, (n, kernel, stride) in enumerate(zip(a.blocks_per_stage, a.kernel_sizes, a.strides, strict=True))
        )

    def __call__(self, x: Float[Array, "b d h w c"]) -> list[Array]:
        outputs = []
        for (stack,) in self.stages:
            x = recomputed(stack, self.remat)(x)
            outputs.append(x)
        return outputs


class Decoder(nnx.Module):
    """From the bottleneck up: transposed convolution, [upsampled, skip], convolutions, and a head at every level."""

    def __init__(self, architecture: Architecture, out_channels: int, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs):
        a = architecture
        self.remat = remat
        levels = range(len(a.features_per_stage) - 2, -1, -1)
        features = a.features_per_stage
        self.transpconvs = nnx.List(
            TransposedConv(features[i + 1], features[i], a.strides[i + 1], dtype=dtype, rngs=rngs) for i in levels
        )
        self.stages = nnx.List(
            ConvStack(
                2 * features[i],
                features[i],
                a.convs_per_stage_decoder[i],
                a.kernel_sizes[i],
                dtype=dtype,
                rngs=rngs,
            )
            for i in levels
        )
        self.seg_layers = nnx.List(Conv(features[i], out_channels, (1, 1, 1), dtype=dtype, rngs=rngs) for i in levels)

    def __call__(self, skips: list[Array], deep_supervision: bool) -> tuple[Array, ...]:
        *skips, x = skips
        logits = []
        for d, skip in enumerate(reversed(skips)):
            x = recomputed(functools.partial(self.level, d), self.remat)(x, skip)
            if deep_supervision or d == len(skips) - 1:
                logits.append(self.seg_layers[d].logits(x))
        return tuple(reversed(logits))

    def level(self, d: int, x: Float[Array, "b d h w c"], skip: Float[Array, "b d2 h2 w2 f"]) -> Float[Array, "b d2 h2 w2 f"]:
        """Features of decoder level `d` from those of the level below and the encoder's at the same resolution."""
        return self.stages[d](jnp.concatenate([self.transpconvs[d](x), skip], axis=-1))


class UNet(nnx.Module):
    """Encoder and decoder. All heads exist, whether deep supervision is asked for or not."""

    def __init__(self, encoder: nnx.Module, decoder: Decoder):
        self.encoder = encoder
        self.decoder = decoder

    def __call__(self, x: Float[Array, "b d h w c"], deep_supervision: bool = True) -> tuple[Array, ...]:
        """Logits (b, d, h, w, classes) in float32, full resolution first, then halved and so on."""
        return self.decoder(self.encoder(x), deep_supervision)


def build_plain_unet(
    architecture: Architecture, in_channels: int, out_channels: int, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs
) -> UNet:
    """nnU-Net's PlainConvUNet. With `remat` the backward pass has each stage's input and output only."""
    encoder = PlainEncoder(architecture, in_channels, dtype=dtype, remat=remat, rngs=rngs)
    return UNet(encoder, Decoder(architecture, out_channels, dtype=dtype, remat=remat, rngs=rngs))


def unet_limits(architecture: Architecture) -> PatchLimits:
    """The product of the strides per axis, both as smallest patch and as increment.

    At the smallest patch the bottleneck is one voxel (PGPS 2025).
    """
    d, h, w = 1, 1, 1
    for sd, sh, sw in architecture.strides:
        d, h, w = d * sd, h * sh, w * sw
    return PatchLimits((d, h, w), (d, h, w))


def unet_lowest_head(architecture: Architecture) -> tuple[str | int, ...] | None:
    """Path of the lowest-resolution head's parameters, or None when there is only one head.

    Its loss has weight zero, and nnU-Net never changes it: not even weight decay does.
    """
    return ("decoder", "seg_layers", 0) if len(architecture.features_per_stage) > 2 else None
