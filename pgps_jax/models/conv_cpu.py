"""3D convolutions for CPU, where XLA's own are several times too slow, and their strided gradients 30 times.

One of three forms is used, with the same numbers up to rounding:

* Winograd's F(4, 3) along depth (Lavin and Gray 2016) on top of 2D convolutions: 6 products of planes instead of 12 give 4 planes.
  At stride 1, where there are channels and voxels enough to pay for mixing planes.
* folded: the planes that a kernel spans side by side, and one 2D convolution: a third of the kernels to compile, and longer rows.
* gathered: the neighbours of each voxel side by side, and one matrix product. For planes smaller than the kernel, where XLA would
  exchange the two and then loop naively.

Arrays are channels-last. Padding is (k - 1) // 2 on both sides of each axis.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from pgps_jax.architecture import Size

_NHWC = ("NHWC", "HWIO", "NHWC")
_WORTH_MIXING = 3 * 10**8  # multiplications of a convolution; below, Winograd's form takes longer to compile than it ever saves


def conv(x, kernel, *, stride: Size):
    """Cross-correlation of x (b, d, h, w, ci) with kernel (kd, kh, kw, ci, co), in the dtype of `x`."""
    forward, _ = _form(x, kernel, stride)
    return forward(*_at_least_float32(x, kernel), stride).astype(x.dtype)


def conv_gradients(x, kernel, g, *, stride: Size):
    """Gradients of the loss by `x` and by `kernel`, from its gradient `g` (b, do, ho, wo, co) by the output of `conv`."""
    _, backward = _form(x, kernel, stride)
    g_x, g_kernel = backward(*_at_least_float32(x, kernel, g), stride)
    return g_x.astype(x.dtype), g_kernel.astype(kernel.dtype)


def _at_least_float32(*arrays):
    """Half precision gains nothing on CPU, and is rounded once, at the end."""
    return [a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in arrays]


def _form(x, kernel, stride):
    (d, h, w), (kd, kh, kw), channels = x.shape[1:4], kernel.shape[:3], kernel.shape[3:]
    if (h // stride[1]) * (w // stride[2]) < kh * kw:
        return _gathered, _gathered_gradients
    possible = kd == 3 and kh % 2 == kw % 2 == 1 and tuple(stride) == (1, 1, 1) and d > 2
    if possible and min(channels) >= 16 and math.prod(x.shape[:4]) * kernel.size >= _WORTH_MIXING:
        return _winograd, _winograd_gradients
    return _folded, _folded_gradients


def _side_by_side(padded, taps: int, stride: int, axis: int):
    """The neighbours along an axis that a kernel of `taps` spans, side by side in the channels, the tap being their slowest index;
    and the taps that they are for: without those that meet nothing but padding."""
    pad = (taps - 1) // 2
    reach = (padded.shape[axis] - taps) // stride * stride + 1
    useful = [t for t in range(taps) if t < padded.shape[axis] - pad and t + reach > pad]
    windows = [lax.slice_in_dim(padded, t, t + reach, stride, axis) for t in useful]
    return jnp.concatenate(windows, axis=-1), slice(useful[0], useful[-1] + 1)


def _gathered(x, kernel, stride):
    x = jnp.pad(x, [(0, 0), *_padding(kernel.shape[:3]), (0, 0)])
    x, columns = _side_by_side(x, kernel.shape[2], stride[2], 3)
    x, rows = _side_by_side(x, kernel.shape[1], stride[1], 2)
    x, planes = _side_by_side(x, kernel.shape[0], stride[0], 1)
    return x @ kernel[planes, rows, columns].reshape(-1, kernel.shape[-1])


def _gathered_gradients(x, kernel, g, stride):
    return jax.vjp(lambda x, kernel: _gathered(x, kernel, stride), x, kernel)[1](g)


def _folded(x, kernel, stride):
    x = jnp.pad(x, [(0, 0), *_padding(kernel.shape[:1]), (0, 0), (0, 0), (0, 0)])
    x, planes = _side_by_side(x, kernel.shape[0], stride[0], 1)
    kernel = kernel[planes].transpose(1, 2, 0, 3, 4)
    y = _conv2d(x.reshape(-1, *x.shape[2:]), kernel.reshape(*kernel.shape[:2], -1, kernel.shape[-1]), stride[1:])
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _folded_gradients(x, kernel, g, stride):
    if tuple(stride) == (1, 1, 1) and all(k % 2 for k in kernel.shape[:3]):
        g_x = _folded(g, kernel[::-1, ::-1, ::-1].swapaxes(3, 4), stride)
        return g_x, jax.vjp(lambda kernel: _folded(x, kernel, stride), kernel)[1](g)[0]
    return jax.vjp(lambda x, kernel: _folded(x, kernel, stride), x, kernel)[1](g)


# Winograd's F(4, 3). Rows of INPUT mix 6 neighbouring planes, rows of KERNEL the 3 slices of the kernel, rows of OUTPUT the 6
# products.
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


def _winograd(x, kernel, stride=(1, 1, 1)):
    b, d = x.shape[:2]
    blocks = _blocks(x)
    mixed = _mix_all(_INPUT, _six_planes([blocks[:, :, j] for j in range(4)], axis=1))
    products = [_conv2d(p.reshape(-1, *p.shape[2:]), k) for p, k in zip(mixed, _mix_all(_KERNEL, kernel), strict=True)]
    y = jnp.stack(_mix_all(_OUTPUT, products), axis=1)
    return y.reshape(b, -1, *y.shape[2:])[:, :d]


def _winograd_gradients(x, kernel, g, stride):
    return _winograd(g, kernel[::-1, ::-1, ::-1].swapaxes(3, 4)), _winograd_kernel_gradient(x, kernel, g)


def _winograd_kernel_gradient(x, kernel, g):
    """Each of the 6 products is a convolution of the planes of `g`, channels for images, with those of `x` for kernels.

    Planes are brought to that order once, all together, and mixed there: XLA would do both at a time, several times slower.
    """
    x, g = (_in_order(_blocks(a).transpose(2, 3, 4, 0, 1, 5)) for a in (x, g))
    g = _in_order(g.transpose(0, 5, 1, 2, 3, 4))
    _, h, w, b, n, ci = x.shape
    products = []
    for planes, slopes in zip(_mix_all(_INPUT, _six_planes(list(x), axis=3)), _mix_all(zip(*_OUTPUT, strict=True), g), strict=True):
        product = lax.conv_general_dilated(
            slopes.reshape(-1, h, w, b * n), planes.reshape(h, w, b * n, ci), (1, 1), _padding(kernel.shape[1:3]),
            dimension_numbers=_NHWC)
        products.append(product[:, ::-1, ::-1].transpose(1, 2, 3, 0))
    return jnp.stack(_mix_all(zip(*_KERNEL, strict=True), products))


def _in_order(x):
    """The same array, moved in memory to the order of its axes."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _conv2d(x, kernel, stride=(1, 1)):
    return lax.conv_general_dilated(x, kernel, stride, _padding(kernel.shape[:2]), dimension_numbers=_NHWC)


def _padding(kernel_size) -> list[tuple[int, int]]:
    return [((k - 1) // 2,) * 2 for k in kernel_size]


def _blocks(x):
    """Blocks of 4 planes, (b, blocks, 4, h, w, c), the last one filled up with zeros."""
    b, d, h, w, c = x.shape
    if d % 4:
        x = jnp.pad(x, [(0, 0), (0, -d % 4), (0, 0), (0, 0), (0, 0)])
    return x.reshape(b, -1, 4, h, w, c)


def _six_planes(four: list, axis: int) -> list:
    """Four planes of each block with one neighbour on both sides; `axis` counts blocks.

    Only the neighbours are copied: padding the whole input takes half as long as the convolution.
    """
    last = four[0].shape[axis]
    nothing = jnp.zeros_like(lax.slice_in_dim(four[0], 0, 1, axis=axis))
    before = jnp.concatenate([nothing, lax.slice_in_dim(four[3], 0, last - 1, axis=axis)], axis=axis)
    after = jnp.concatenate([lax.slice_in_dim(four[0], 1, last, axis=axis), nothing], axis=axis)
    return [before, *four, after]


def _mix_all(rows, arrays) -> list:
    """A linear combination of `arrays` per row, without the terms that are zero."""
    return [functools.reduce(jnp.add, (float(c) * a if c != 1 else a for c, a in zip(row, arrays, strict=True) if c)) for row in rows]
