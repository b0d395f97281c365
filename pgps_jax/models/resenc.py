"""The residual-encoder U-Net of nnU-Net (ResidualEncoderUNet); its decoder is the plain U-Net's.

Attribute paths are nnU-Net's parameter names: `encoder.stem.convs.0`, `encoder.stages.{s}.blocks.{b}.conv1` and so on.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pgps_jax.architecture import Architecture, Size
from pgps_jax.models.blocks import ResidualBlock, recomputed
from pgps_jax.models.unet import ConvStack, Decoder, UNet


class ResidualStage(nnx.Module):
    """Residual blocks one after the other; the first may have a stride."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_blocks: int,
        kernel_size: Size,
        stride: Size,
        *,
        dtype=jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        self.remat = remat
        self.blocks = nnx.List(
            ResidualBlock(
                out_features if i else in_features,
                out_features,
                kernel_size,
                (1, 1, 1) if i else stride,
                dtype=dtype,
                rngs=rngs,
            )
            for i in range(num_blocks)
        )

    def __call__(self, x: Float[Array, "b d h w ci"]) -> Float[Array, "b do ho wo co"]:
        for block in self.blocks:
            x = recomputed(block, self.remat)(x)
        return x


class ResidualEncoder(nnx.Module):
    """One convolution block at full resolution, then residual stages. Returns every stage's output."""

    def __init__(self, architecture: Architecture, in_channels: int, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs):
        a = architecture
        features = (a.features_per_stage[0], *a.features_per_stage)
        self.remat = remat
        self.stem = ConvStack(in_channels, features[0], 1, a.kernel_sizes[0], dtype=dtype, rngs=rngs)
        self.stages = nnx.List(
            ResidualStage(features[s], features[s + 1], n, kernel, stride, dtype=dtype, remat=remat, rngs=rngs)
            for s, (n, kernel, stride) in enumerate(zip(a.blocks_per_stage, a.kernel_sizes, a.strides, strict=True))
        )

    def __call__(self, x: Float[Array, "b d h w c"]) -> list[Array]:
        x = recomputed(self.stem, self.remat)(x)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


def build_resenc_unet(
    architecture: Architecture, in_channels: int, out_channels: int, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs
) -> UNet:
    """nnU-Net's ResidualEncoderUNet. With `remat` the backward pass has the inputs of residual blocks and decoder levels only."""
    encoder = ResidualEncoder(architecture, in_channels, dtype=dtype, remat=remat, rngs=rngs)
    return UNet(encoder, Decoder(architecture, out_channels, dtype=dtype, remat=remat, rngs=rngs))
