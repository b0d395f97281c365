"""What transformers are built of: windows of tokens, attention, layer norm and the two-layer perceptron.

Parameters are float32; `dtype` is what matrix products compute in. Softmax and norms are float32 where
the dtype is of half precision. Products of float32 keep all its bits (`models.conv.precision_for`).
Parameter names are MONAI's, with `kernel` and `scale` for PyTorch's `weight`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from pgps_jax.architecture import Size
from pgps_jax.models.blocks import add_bias
from pgps_jax.models.conv import precision_for


def to_windows(
    x: Shaped[Array | np.ndarray, "b d h w c"], window: Size
) -> Shaped[Array | np.ndarray, "b windows tokens c"]:
    """Cut a volume whose sizes are multiples of the window's; windows and the tokens in them run along w fastest."""
    b, d, h, w, c = x.shape
    wd, wh, ww = window
    # axis by axis: above rank 6 XLA's CPU reductions crash
    x = x.reshape(b * (d // wd), wd, h // wh, wh * w * c).swapaxes(1, 2)
    x = x.reshape(b * (d // wd) * (h // wh), wd * wh, w // ww, ww * c).swapaxes(1, 2)
    return x.reshape(b, (d // wd) * (h // wh) * (w // ww), wd * wh * ww, c)


def from_windows(x: Shaped[Array, "b windows tokens c"], window: Size, shape: Size) -> Shaped[Array, "b d h w c"]:
    """The volume of (d, h, w) = `shape` that `to_windows` has cut."""
    b, _, _, c = x.shape
    (d, h, w), (wd, wh, ww) = shape, window
    x = x.reshape(b * (d // wd) * (h // wh), w // ww, wd * wh, ww * c).swapaxes(1, 2)
    x = x.reshape(b * (d // wd), h // wh, wd, wh * w * c).swapaxes(1, 2)
    return x.reshape(b, d, h, w, c)


def at_least_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Half precision widened to float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def attend(
    qkv: Float[Array, "*batch n threec"], num_heads: int, bias: Float[Array, "..."] | None = None
) -> Float[Array, "*batch n c"]:
    """Softmax attention, softmax(q k^T / sqrt(c / heads) + bias) v, on the concatenated queries, keys and values.

    `bias` is added to the logits (*batch, heads, n, n), to whose shape it broadcasts. The result has the dtype of `qkv`.
    """
    *batch, n, width = qkv.shape
    head = width // (3 * num_heads)
    q, k, v = jnp.moveaxis(qkv.reshape(*batch, n, 3, num_heads, head), -3, 0)
    wide, precision = jnp.promote_types(q.dtype, jnp.float32), precision_for(q.dtype)
    logits = jnp.einsum("...qhd,...khd->...hqk", q, k, precision=precision, preferred_element_type=wide) / math.sqrt(head)
    weights = jax.nn.softmax(logits if bias is None else logits + bias).astype(v.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, v, precision=precision).reshape(*batch, n, num_heads * head)


def layer_norm(
    x: Float[Array, "*batch c"],
    scale: Float[Array, " c"] | None = None,
    shift: Float[Array, " c"] | None = None,
    eps: float = 1e-5,
) -> Float[Array, "*batch c"]:
    """Normalise over the last axis (biased variance), in at least float32; then scale and shift if given."""
    wide = at_least_float32(x)
    mean = wide.mean(axis=-1, keepdims=True)
    y = (wide - mean) * jax.lax.rsqrt(jnp.square(wide - mean).mean(axis=-1, keepdims=True) + eps)
    if scale is not None:
        y = y * scale
    if shift is not None:
        y = y + shift
    return y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with scale and shift."""

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        return layer_norm(x, self.scale[...], self.bias[...])


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> Array:
    """PyTorch's initial weights and biases: uniform within 1 / sqrt(fan_in) of zero."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)


class Linear(nnx.Module):
    """Matrix product and bias over the last axis; kernel (in, out)."""

    def __init__(
        self, in_features: int, out_features: int, *, use_bias: bool = True, dtype=jnp.float32, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(uniform(rngs, (in_features, out_features), in_features))
        self.bias = nnx.Param(uniform(rngs, (out_features,), in_features)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch ci"]) -> Float[Array, "*batch co"]:
        y = jnp.matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype), precision=precision_for(self.dtype))
        return y if self.bias is None else add_bias(y, self.bias[...])


class Perceptron(nnx.Module):
    """Linear, GELU (the exact one), linear."""

    def __init__(self, features: int, hidden: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.linear1 = Linear(features, hidden, dtype=dtype, rngs=rngs)
        self.linear2 = Linear(hidden, features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        hidden = self.linear1(x)
        return self.linear2(jax.nn.gelu(at_least_float32(hidden), approximate=False).astype(hidden.dtype))


class PatchEmbedding(nnx.Module):
    """Convolution whose kernel equals its stride: one token per block of `size` voxels; kernel (size, in, out).

    At least float32, on accelerators too, which would round the operands unless told not to: it costs little, and images have more
    than bfloat16's 8 bits.
    """

    def __init__(self, in_channels: int, features: int, size: Size, *, rngs: nnx.Rngs):
        fan_in = math.prod(size) * in_channels
        self.kernel = nnx.Param(uniform(rngs, (*size, in_channels, features), fan_in))
        self.bias = nnx.Param(uniform(rngs, (features,), fan_in))
        self.size = tuple(size)

    def __call__(self, x: Float[Array, "b d h w ci"]) -> Float[Array, "b do ho wo co"]:
        b, *shape, _ = x.shape
        blocks = to_windows(at_least_float32(x), self.size)
        kernel = self.kernel[...].reshape(-1, self.bias.shape[0])
        y = jnp.matmul(blocks.reshape(*blocks.shape[:2], -1), kernel, precision=precision_for(kernel.dtype)) + self.bias[...]
        return y.reshape(b, *(n // s for n, s in zip(shape, self.size, strict=True)), -1)
