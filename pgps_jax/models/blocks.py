"""What the networks are built of. Parameters are float32; `dtype` is what convolutions compute in.

Initialisation is nnU-Net's: He normal for a leaky ReLU of slope 0.01 over the fan-in, zero biases, unit norms.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pgps_jax.architecture import Size
from pgps_jax.models.conv import conv3d, conv_transpose3d, instance_norm, logits

SLOPE = 0.01  # of every leaky ReLU


def he_normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> Array:
    """Float32 normal draws of standard deviation sqrt(2 / (1 + SLOPE^2)) / sqrt(fan_in)."""
    return jax.random.normal(rngs.params(), shape) * math.sqrt(2 / ((1 + SLOPE**2) * fan_in))


def add_bias(y: Float[Array, "*batch c"], bias: Float[Array, " c"]) -> Float[Array, "*batch c"]:
    """`y` + `bias` in the dtype of `y`, added in at least float32: the gradient of a bias is a sum over all voxels, which would
    stand still in half precision after a few hundred."""
    return (y.astype(jnp.promote_types(y.dtype, jnp.float32)) + bias).astype(y.dtype)


def recomputed(block: Callable, remat: bool) -> Callable:
    """`block` itself, or with `remat` the same whose inside is computed again in the backward pass instead of kept."""
    return jax.checkpoint(block) if remat else block


class Conv(nnx.Module):
    """3D convolution, padded by (k - 1) // 2; kernel (kd, kh, kw, in, out)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Size,
        stride: Size = (1, 1, 1),
        *,
        use_bias: bool = True,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        fan_in = in_features * math.prod(kernel_size)
        self.kernel = nnx.Param(he_normal(rngs, (*kernel_size, in_features, out_features), fan_in))
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None
        self.stride = tuple(stride)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b d h w ci"]) -> Float[Array, "b do ho wo co"]:
        y = self.without_bias(x)
        return y if self.bias is None else add_bias(y, self.bias[...])

    def without_bias(self, x: Float[Array, "b d h w ci"]) -> Float[Array, "b do ho wo co"]:
        """The convolution alone, for a norm that would take the bias away again."""
        return conv3d(x.astype(self.dtype), self.kernel[...].astype(self.dtype), stride=self.stride)

    def logits(self, x: Float[Array, "b d h w ci"]) -> Float[Array, "b d h w co"]:
        """What a network's head gives, a pointwise convolution and its bias: at least float32, whatever computes."""
        return logits(x.astype(self.dtype), self.kernel[0, 0, 0]) + self.bias[...]


class TransposedConv(nnx.Module):
    """Transposed convolution with kernel = stride; kernel (sd, sh, sw, in, out)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: Size,
        *,
        use_bias: bool = True,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        # PyTorch takes the fan-in of a transposed convolution from its output channels
        fan_in = out_features * math.prod(stride)
        self.kernel = nnx.Param(he_normal(rngs, (*stride, in_features, out_features), fan_in))
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b d h w ci"]) -> Float[Array, "b do ho wo co"]:
        y = conv_transpose3d(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else add_bias(y, self.bias[...])


class InstanceNorm(nnx.Module):
    """Instance norm, with a leaky ReLU of the given slope fused to it (None: no nonlinearity)."""

    def __init__(self, features: int, *, negative_slope: float | None = None, zero: bool = False):
        self.scale = nnx.Param(jnp.zeros(features) if zero else jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.negative_slope = negative_slope

    def __call__(self, x: Float[Array, "b d h w c"]) -> Float[Array, "b d h w c"]:
        return instance_norm(x, self.scale[...], self.bias[...], negative_slope=self.negative_slope)


class ConvNormAct(nnx.Module):
    """Convolution, instance norm, leaky ReLU (`activate=False`: without it).

    The convolution's bias exists as a parameter, as in nnU-Net's checkpoints, but is not added: instance norm takes any
    constant away, so that output and gradients are the same without it (its own gradient is exactly zero).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Size,
        stride: Size = (1, 1, 1),
        *,
        use_bias: bool = True,
        activate: bool = True,
        zero_norm: bool = False,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(in_features, out_features, kernel_size, stride, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.norm = InstanceNorm(out_features, negative_slope=SLOPE if activate else None, zero=zero_norm)

    def __call__(self, x: Float[Array, "b d h w ci"]) -> Float[Array, "b do ho wo co"]:
        return self.norm(self.conv.without_bias(x))


class AveragePool(nnx.Module):
    """Mean over blocks of `stride` voxels; sizes must be divisible."""

    def __init__(self, stride: Size):
        self.stride = tuple(stride)

    def __call__(self, x: Float[Array, "b d h w c"]) -> Float[Array, "b do ho wo c"]:
        for axis, s in enumerate(self.stride, start=1):  # axis by axis: ranks above 6 crash XLA's CPU reductions
            if s > 1:
                x = x.reshape(*x.shape[:axis], x.shape[axis] // s, s, *x.shape[axis + 1 :]).mean(axis=axis + 1)
        return x


class ResidualBlock(nnx.Module):
    """Basic block of a ResNet-D: two convolutions beside a skip that pools and projects where the shape changes.

    The second norm starts at zero, so each block starts as its skip.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Size,
        stride: Size = (1, 1, 1),
        *,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.conv1 = ConvNormAct(in_features, out_features, kernel_size, stride, dtype=dtype, rngs=rngs)
        self.conv2 = ConvNormAct(
            out_features, out_features, kernel_size, activate=False, zero_norm=True, dtype=dtype, rngs=rngs
        )
        skip = [AveragePool(stride)] if max(stride) > 1 else []
        if in_features != out_features:
            skip.append(
                ConvNormAct(
                    in_features, out_features, (1, 1, 1), use_bias=False, activate=False, dtype=dtype, rngs=rngs
                )
            )
        self.skip = nnx.List(skip)

    def __call__(self, x: Float[Array, "b d h w ci"]) -> Float[Array, "b do ho wo co"]:
        y = self.conv2(self.conv1(x))
        for part in self.skip:
            x = part(x)
        total = y.astype(jnp.promote_types(y.dtype, jnp.float32)) + x
        return jnp.where(total > 0, total, SLOPE * total).astype(y.dtype)  # rounded once to half precision
