"""3D convolution, transposed convolution and instance norm: the one place that knows platforms.

All arrays are channels-last, (batch, d, h, w, channels). On GPU and TPU a convolution is XLA's own. On CPU, where XLA's
3D convolutions are several times too slow (and their strided gradients 30 times), it is a sum of 2D convolutions over
slices that are shifted along d, with the same numbers up to rounding.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pgps_jax.architecture import Size

_PADDED_CHANNELS = 8  # XLA pads the channels of half-precision convolutions for cuDNN in float16 only


def conv3d(
    x: Float[Array, "b d h w ci"],
    kernel: Float[Array, "kd kh kw ci co"],
    bias: Float[Array, " co"] | None = None,
    stride: Size = (1, 1, 1),
) -> Float[Array, "b do ho wo co"]:
    """Cross-correlation with zero padding of (k - 1) // 2 voxels on both sides of each axis, as PyTorch's Conv3d.

    `kernel` has the dtype of `x`, in which the result comes back. Axes with an even kernel shrink by one.
    """
    if kernel.shape[:3] == (1, 1, 1) and tuple(stride) == (1, 1, 1):
        y = jnp.tensordot(x, kernel[0, 0, 0], axes=1)
    else:
        y = _conv(x, kernel, tuple(stride))
    return y if bias is None else y + bias.astype(y.dtype)


def conv_transpose3d(
    x: Float[Array, "b d h w ci"],
    kernel: Float[Array, "sd sh sw ci co"],
    bias: Float[Array, " co"] | None = None,
) -> Float[Array, "b do ho wo co"]:
    """Transposed convolution whose kernel equals its stride, so that no two inputs meet in an output voxel.

    One matrix product followed by an interleave: `y[s * n + r] = x[n] @ kernel[r]` on each axis (PyTorch's
    ConvTranspose3d without a flip). XLA's own transposed convolution has a very slow weight gradient.
    """
    b, d, h, w, ci = x.shape
    sd, sh, sw, _, co = kernel.shape
    y = jnp.tensordot(x, kernel.transpose(3, 0, 1, 2, 4).reshape(ci, sd * sh * sw * co), axes=1)
    y = y.reshape(b * d, h, w, sd, sh, sw * co).transpose(0, 3, 1, 4, 2, 5)  # rank 6: XLA's CPU reductions crash at 7
    y = y.reshape(b, d * sd, h * sh, w * sw, co)
    return y if bias is None else y + bias.astype(y.dtype)


def instance_norm(
    x: Float[Array, "b d h w c"],
    scale: Float[Array, " c"],
    shift: Float[Array, " c"],
    eps: float = 1e-5,
    negative_slope: float | None = None,
) -> Float[Array, "b d h w c"]:
    """Normalise each sample and channel over space (biased variance), scale, shift; then leaky ReLU if asked for.

    Statistics are float32 whatever the dtype of `x`. One voxel gives its shift. The backward pass keeps only
    `x` and the statistics; the slope holds at zero too, as in PyTorch.
    """
    b, d, h, w, c = x.shape
    slope = 1.0 if negative_slope is None else negative_slope
    return _norm(x.reshape(b, d * h * w, c), scale, shift, eps, slope).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _norm(x: Float[Array, "b n c"], scale, shift, eps: float, slope: float) -> Float[Array, "b n c"]:
    return _norm_forward(x, scale, shift, eps, slope)[0]


def _norm_forward(x, scale, shift, eps, slope):
    x32 = x.astype(jnp.float32)
    mean = x32.mean(axis=1, keepdims=True)
    rstd = lax.rsqrt(jnp.square(x32 - mean).mean(axis=1, keepdims=True) + eps)
    y = (x32 - mean) * (rstd * scale) + shift
    return _leaky(y, y, slope).astype(x.dtype), (x, mean, rstd, scale, shift)


def _norm_backward(eps, slope, kept, g):
    x, mean, rstd, scale, shift = kept
    normal = (x.astype(jnp.float32) - mean) * rstd
    g = _leaky(g.astype(jnp.float32), normal * scale + shift, slope)
    g_sum, g_normal_sum = g.sum(axis=1, keepdims=True), (g * normal).sum(axis=1, keepdims=True)
    g_x = (rstd * scale) * (g - (g_sum + normal * g_normal_sum) / x.shape[1])
    return g_x.astype(x.dtype), g_normal_sum.sum(axis=(0, 1)), g_sum.sum(axis=(0, 1))


_norm.defvjp(_norm_forward, _norm_backward)


def _leaky(x, sign, slope):
    return x if slope == 1.0 else jnp.where(sign > 0, x, slope * x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x, kernel, stride: Size):
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_conv_cpu, stride=stride),
        cuda=functools.partial(_conv_padded_channels, stride=stride),
        default=functools.partial(_conv_native, stride=stride),
    )


def _conv_backward(stride, kept, g):
    def gradients_of(convolve):
        return lambda x, kernel, g: jax.vjp(functools.partial(convolve, stride=stride), x, kernel)[1](g)

    return lax.platform_dependent(
        *kept,
        g,
        cpu=functools.partial(_conv_cpu_gradients, stride=stride),
        cuda=gradients_of(_conv_padded_channels),
        default=gradients_of(_conv_native),
    )


_conv.defvjp(lambda x, kernel, stride: (_conv(x, kernel, stride), (x, kernel)), _conv_backward)


def _padding(kernel) -> list[tuple[int, int]]:
    return [((k - 1) // 2,) * 2 for k in kernel.shape[:-2]]


def _conv_native(x, kernel, *, stride):
    return lax.conv_general_dilated(x, kernel, stride, _padding(kernel), dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))


def _conv_padded_channels(x, kernel, *, stride):
    """Native convolution; a half-precision one with few input channels is widened so that cuDNN has a kernel for it."""
    missing = -x.shape[-1] % _PADDED_CHANNELS
    if missing and x.dtype.itemsize == 2:
        x = jnp.pad(x, [(0, 0)] * 4 + [(0, missing)])
        kernel = jnp.pad(kernel, [(0, 0)] * 3 + [(0, missing), (0, 0)])
    return _conv_native(x, kernel, stride=stride)


def _conv_cpu(x, kernel, *, stride):
    """Sum of 2D convolutions over planes of the depth axis; the planes are few by Winograd's trick, if not strided."""
    dtype = x.dtype
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)  # half precision gains nothing here: round once
    convolve = _conv_winograd if _is_winograd(x, kernel, stride) else functools.partial(_conv_by_slices, stride=stride)
    return convolve(x, kernel).astype(dtype)


def _conv_cpu_gradients(x, kernel, g, *, stride):
    dtype = x.dtype
    x, kernel, g = (a.astype(jnp.float32) for a in (x, kernel, g))
    if _is_winograd(x, kernel, stride):
        g_x = _conv_winograd(g, kernel[::-1, ::-1, ::-1].swapaxes(3, 4))
        g_kernel = _winograd_kernel_gradient(x, kernel, g)
    else:
        g_x, g_kernel = jax.vjp(functools.partial(_conv_by_slices, stride=stride), x, kernel)[1](g)
    return g_x.astype(dtype), g_kernel.astype(dtype)


def _conv2d(x, kernel, stride=(1, 1)):
    return lax.conv_general_dilated(x, kernel, stride, _padding(kernel), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _conv_by_slices(x, kernel, *, stride):
    b, d, h, w, ci = x.shape
    kd = kernel.shape[0]
    pad = (kd - 1) // 2
    if d == 1 and kd == 3:  # the outer slices would see padding only
        kernel, kd, pad = kernel[1:2], 1, 0
    depth = (d + 2 * pad - kd) // stride[0] + 1
    padded = jnp.pad(x, [(0, 0), (pad, pad), (0, 0), (0, 0), (0, 0)])
    total = 0.0
    for i in range(kd):
        planes = lax.slice_in_dim(padded, i, i + (depth - 1) * stride[0] + 1, stride[0], axis=1)
        total = total + _conv2d(planes.reshape(b * depth, h, w, ci), kernel[i], stride[1:])
    return total.reshape(b, depth, *total.shape[1:])


# Winograd's F(4, 3) along depth (Lavin and Gray 2016): 6 products of planes instead of 12 give 4 planes of output.
# Rows of INPUT mix 6 neighbouring planes, rows of KERNEL the 3 slices of the kernel, rows of OUTPUT the 6 products.
_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def _is_winograd(x, kernel, stride) -> bool:
    """Where fewer products pay for mixing planes: not for the image's few channels, nor for one or two planes."""
    return kernel.shape[0] == 3 and tuple(stride) == (1, 1, 1) and x.shape[1] >= 3 and min(kernel.shape[3:]) >= 16


def _mix(row, arrays):
    """Linear combination that skips zero coefficients."""
    return sum(float(c) * a if c != 1 else a for c, a in zip(row, arrays, strict=True) if c)


def _winograd_planes(x):
    """Mixed input planes: 6 arrays (b * blocks, h, w, c) for `blocks` blocks of 4 output planes."""
    b, d, h, w, c = x.shape
    blocks = -(-d // 4)
    x = jnp.pad(x, [(0, 0), (1, 4 * blocks + 3 - d), (0, 0), (0, 0), (0, 0)]).reshape(b, blocks + 1, 4, h, w, c)
    planes = [x[:, :-1, j] for j in range(4)] + [x[:, 1:, j] for j in range(2)]
    return [_mix(row, planes).reshape(b * blocks, h, w, c) for row in _INPUT]


def _conv_winograd(x, kernel):
    b, d = x.shape[:2]
    products = [_conv2d(planes, _mix(row, kernel)) for planes, row in zip(_winograd_planes(x), _KERNEL, strict=True)]
    y = jnp.stack([_mix(row, products) for row in _OUTPUT], axis=1)
    return y.reshape(b, -1, *y.shape[2:])[:, :d]


def _winograd_kernel_gradient(x, kernel, g):
    b, d, h, w, c = g.shape
    blocks = -(-d // 4)
    g = jnp.pad(g, [(0, 0), (0, 4 * blocks - d), (0, 0), (0, 0), (0, 0)]).reshape(b * blocks, 4, h, w, c)
    columns = list(zip(*_OUTPUT, strict=True))
    products = []
    for planes, column in zip(_winograd_planes(x), columns, strict=True):
        _, pullback = jax.vjp(lambda k, planes=planes: _conv2d(planes, k), kernel[0])
        products += pullback(_mix(column, [g[:, r] for r in range(4)]))
    return jnp.stack([_mix(column, products) for column in zip(*_KERNEL, strict=True)])


def compiler_options(platform: str) -> dict[str, str]:
    """XLA options for programs that train or run these networks on `platform` ("cpu", "gpu", ...), for `compile`.

    On CPU the YNN library is left the reductions, where it is fast; convolutions and matrix products go to Eigen.
    """
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"} if platform == "cpu" else {}
