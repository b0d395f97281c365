"""3D convolution, transposed convolution and instance norm: the one place that knows platforms.

All arrays are channels-last, (batch, d, h, w, channels). On GPU and TPU a convolution is XLA's own, on CPU it is made of
2D ones (conv_cpu.py), with the same numbers up to rounding.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pgps_jax.architecture import Size
from pgps_jax.models import conv_cpu

_PADDED_CHANNELS = 8  # XLA pads the channels of half-precision convolutions for cuDNN in float16 only


def precision_for(dtype) -> lax.Precision | None:
    """Precision of products of arrays of `dtype`: float32 and wider keep all their bits.

    By default accelerators round float32 before they multiply, TPUs to bfloat16 and NVIDIA's GPUs to TF32 (10 bits).
    """
    return None if jnp.dtype(dtype).itemsize == 2 else lax.Precision.HIGHEST


def conv3d(
    x: Float[Array, "b d h w ci"], kernel: Float[Array, "kd kh kw ci co"], stride: Size = (1, 1, 1)
) -> Float[Array, "b do ho wo co"]:
    """Cross-correlation with zero padding of (k - 1) // 2 voxels on both sides of each axis, as PyTorch's Conv3d.

    `kernel` has the dtype of `x`, in which the result comes back. Axes with an even kernel shrink by one.
    """
    if kernel.shape[:3] == (1, 1, 1) and tuple(stride) == (1, 1, 1):
        return jnp.tensordot(x, kernel[0, 0, 0], axes=1, precision=precision_for(x.dtype))
    return _conv(x, kernel, tuple(stride))


def conv_transpose3d(
    x: Float[Array, "b d h w ci"], kernel: Float[Array, "sd sh sw ci co"]
) -> Float[Array, "b do ho wo co"]:
    """Transposed convolution whose kernel equals its stride, so that no two inputs meet in an output voxel.

    One matrix product followed by an interleave: `y[s * n + r] = x[n] @ kernel[r]` on each axis (PyTorch's
    ConvTranspose3d without a flip). XLA's own transposed convolution has a very slow weight gradient.
    """
    b, d, h, w, ci = x.shape
    sd, sh, sw, _, co = kernel.shape
    y = jnp.tensordot(x, kernel.transpose(3, 0, 1, 2, 4).reshape(ci, sd * sh * sw * co), axes=1, precision=precision_for(x.dtype))
    y = y.reshape(b * d, h, w, sd, sh, sw * co).transpose(0, 3, 1, 4, 2, 5)  # rank 6: XLA's CPU reductions crash at 7
    return y.reshape(b, d * sd, h * sh, w * sw, co)


@jax.custom_vjp
def logits(x: Float[Array, "*batch ci"], kernel: Float[Array, "ci co"]) -> Float[Array, "*batch co"]:
    """`x` @ `kernel`, multiplied in the dtype of `x` and added up and returned in at least float32.

    Rounded to bfloat16, logits near 10 would lie 0.06 apart, and classes would tie. Gradients are multiplied in the dtype of `x` too:
    autodiff would widen `x` instead, the largest array there is.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=1, precision=precision_for(x.dtype), preferred_element_type=wide)


def _logits_backward(kept, g):
    x, kernel = kept
    g, every = g.astype(x.dtype), list(range(x.ndim - 1))
    g_x = jnp.tensordot(g, kernel.astype(x.dtype).T, axes=1, precision=precision_for(x.dtype))
    g_kernel = jnp.tensordot(x, g, axes=(every, every), precision=precision_for(x.dtype), preferred_element_type=kernel.dtype)
    return g_x, g_kernel


logits.defvjp(lambda x, kernel: (logits(x, kernel), (x, kernel)), _logits_backward)


def instance_norm(
    x: Float[Array, "b d h w c"],
    scale: Float[Array, " c"],
    shift: Float[Array, " c"],
    eps: float = 1e-5,
    negative_slope: float | None = None,
) -> Float[Array, "b d h w c"]:
    """Normalise each sample and channel over space (biased variance), scale, shift; then leaky ReLU if asked for.

    Statistics are float32 where `x` is of half precision. One voxel gives its shift. The backward pass keeps only
    `x` and the statistics; the slope holds at zero too, as in PyTorch.
    """
    b, d, h, w, c = x.shape
    slope = 1.0 if negative_slope is None else negative_slope
    return _norm(x.reshape(b, d * h * w, c), scale, shift, eps, slope).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _norm(x: Float[Array, "b n c"], scale, shift, eps: float, slope: float) -> Float[Array, "b n c"]:
    return _norm_forward(x, scale, shift, eps, slope)[0]


def _norm_forward(x, scale, shift, eps, slope):
    wide = _at_least_float32(x)
    mean = wide.mean(axis=1, keepdims=True)
    rstd = lax.rsqrt(jnp.square(wide - mean).mean(axis=1, keepdims=True) + eps)
    y = (wide - mean) * (rstd * scale) + shift
    return _leaky(y, y, slope).astype(x.dtype), (x, mean, rstd, scale, shift)


def _norm_backward(eps, slope, kept, g):
    x, mean, rstd, scale, shift = kept
    normal = (_at_least_float32(x) - mean) * rstd
    g = _leaky(_at_least_float32(g), normal * scale + shift, slope)
    g_sum, g_normal_sum = g.sum(axis=1, keepdims=True), (g * normal).sum(axis=1, keepdims=True)
    g_x = (rstd * scale) * (g - (g_sum + normal * g_normal_sum) / x.shape[1])
    return g_x.astype(x.dtype), g_normal_sum.sum(axis=(0, 1)), g_sum.sum(axis=(0, 1))


_norm.defvjp(_norm_forward, _norm_backward)


def _at_least_float32(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _leaky(x, sign, slope):
    return x if slope == 1.0 else jnp.where(sign > 0, x, slope * x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x, kernel, stride: Size):
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(conv_cpu.conv, stride=stride),
        cuda=functools.partial(_conv_padded_channels, stride=stride),
        default=functools.partial(_conv_native, stride=stride),
    )


def _conv_backward(stride, kept, g):
    def gradients_of(convolve):
        return lambda x, kernel, g: jax.vjp(functools.partial(convolve, stride=stride), x, kernel)[1](g)

    return lax.platform_dependent(
        *kept,
        g,
        cpu=functools.partial(conv_cpu.conv_gradients, stride=stride),
        cuda=gradients_of(_conv_padded_channels),
        default=gradients_of(_conv_native),
    )


_conv.defvjp(lambda x, kernel, stride: (_conv(x, kernel, stride), (x, kernel)), _conv_backward)


def _padding(kernel) -> list[tuple[int, int]]:
    return [((k - 1) // 2,) * 2 for k in kernel.shape[:-2]]


def _conv_native(x, kernel, *, stride):
    return lax.conv_general_dilated(
        x, kernel, stride, _padding(kernel), dimension_numbers=("NDHWC", "DHWIO", "NDHWC"), precision=precision_for(x.dtype))


def _conv_padded_channels(x, kernel, *, stride):
    """Native convolution; a half-precision one of few or odd channels is widened, so that cuDNN has kernels for it and its gradients."""
    *_, ci, co = kernel.shape
    more_in, more_out = (-n % _PADDED_CHANNELS if x.dtype.itemsize == 2 else 0 for n in (ci, co))
    x = jnp.pad(x, [(0, 0)] * 4 + [(0, more_in)])
    kernel = jnp.pad(kernel, [(0, 0)] * 3 + [(0, more_in), (0, more_out)])
    return _conv_native(x, kernel, stride=stride)[..., :co]


def compiler_options(platform: str) -> dict[str, str]:
    """XLA options for programs that train or run these networks on `platform` ("cpu", "gpu", ...), for `compile`.

    On CPU the YNN library is left the reductions, where it is fast; convolutions and matrix products go to Eigen. LLVM's second and
    third level cost a sixth of the compilation and make no step faster: what takes time lies in these libraries.
    """
    if platform != "cpu":
        return {}
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE", "xla_backend_optimization_level": "1"}
