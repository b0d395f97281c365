"""Convolutions and norms against plainer implementations of the same definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pgps_jax.models.conv import compiler_options, conv3d, conv_transpose3d, instance_norm


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def native(x, kernel, stride):
    padding = [((k - 1) // 2,) * 2 for k in kernel.shape[:3]]
    return lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))


def relative_error(a, b) -> float:
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


def with_gradients(f):
    """Function that gives the value of f, and the gradients of its product with fixed random numbers."""

    def run(*args):
        y, pullback = jax.vjp(f, *args)
        return y, *pullback(draw(9, *y.shape))

    return run


def value_and_gradients(f, *args):
    """The same of these arguments; compiled without LLVM's optimisations, which take longer."""
    return jax.jit(with_gradients(f)).lower(*args).compile({"xla_backend_optimization_level": 0})(*args)


@pytest.fixture(params=[0, 10**12], ids=["mixed", "sliced"])
def form(request, monkeypatch):
    """Small convolutions in the form of large ones as well."""
    monkeypatch.setattr("pgps_jax.models.conv_cpu._WORTH_MIXING", request.param)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8])  # a single plane, folded, Winograd with and without a remainder
def test_a_convolution_and_its_gradients_are_xlas(depth):
    x, kernel = draw(0, 2, depth, 4, 6, 16), draw(1, 3, 3, 3, 16, 16)
    ours = value_and_gradients(conv3d, x, kernel)
    theirs = value_and_gradients(lambda x, k: native(x, k, (1, 1, 1)), x, kernel)
    assert max(map(relative_error, ours, theirs)) < 5e-6


@pytest.mark.parametrize("size", [(4, 2, 4), (1, 2, 2), (6, 1, 1), (8, 16, 2), (3, 1, 9)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
def test_planes_smaller_or_hardly_larger_than_the_kernel_give_what_xla_gives(size, stride):
    size = tuple(n if n % s == 0 else n * s for n, s in zip(size, stride, strict=True))
    x, kernel = draw(0, 2, *size, 16), draw(1, 3, 3, 3, 16, 32)
    ours = value_and_gradients(lambda x, k: conv3d(x, k, stride=stride), x, kernel)
    theirs = value_and_gradients(lambda x, k: native(x, k, stride), x, kernel)
    assert max(map(relative_error, ours, theirs)) < 5e-6


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("kernel_size", [(3, 1, 1), (3, 3, 1), (1, 3, 3)])
def test_flat_kernels_give_what_xla_gives(kernel_size):
    x, kernel = draw(0, 2, 6, 4, 6, 16), draw(1, *kernel_size, 16, 32)
    ours = value_and_gradients(conv3d, x, kernel)
    theirs = value_and_gradients(lambda x, k: native(x, k, (1, 1, 1)), x, kernel)
    assert max(map(relative_error, ours, theirs)) < 5e-6


def test_no_convolution_on_cpu_has_more_kernel_than_image():
    """XLA would exchange the two and loop naively."""
    x, kernel = draw(0, 9, 8, 4, 2, 16), draw(1, 3, 3, 3, 16, 16)
    for stride in [(1, 1, 1), (2, 2, 2)]:
        run = jax.jit(with_gradients(lambda x, k, stride=stride: conv3d(x, k, stride=stride)))
        assert "convolution(" not in run.lower(x, kernel).compile().as_text()


@pytest.mark.parametrize(
    ("kernel_size", "stride"), [((3, 3, 3), (2, 2, 2)), ((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (1, 2, 2)), ((1, 1, 1), (2, 2, 2))]
)
def test_strided_and_anisotropic_convolutions_and_their_gradients_are_xlas(kernel_size, stride):
    x, kernel = draw(0, 2, 4, 6, 4, 3), draw(1, *kernel_size, 3, 5)
    ours = value_and_gradients(lambda x, k: conv3d(x, k, stride=stride), x, kernel)
    theirs = value_and_gradients(lambda x, k: native(x, k, stride), x, kernel)
    assert max(map(relative_error, ours, theirs)) < 5e-6


def test_a_pointwise_convolution_is_a_matrix_product():
    x, kernel = draw(0, 2, 3, 4, 5, 6), draw(1, 1, 1, 1, 6, 2)
    np.testing.assert_allclose(conv3d(x, kernel), x @ kernel[0, 0, 0], atol=1e-5)


def test_a_transposed_convolution_spreads_each_voxel_over_its_block():
    x, kernel = draw(0, 2, 2, 3, 2, 4), draw(1, 2, 1, 3, 4, 5)
    y = np.asarray(conv_transpose3d(x, kernel))
    assert y.shape == (2, 4, 3, 6, 5)
    for i, j, k in np.ndindex(2, 1, 3):
        np.testing.assert_allclose(y[:, i::2, j::1, k::3], x @ kernel[i, j, k], atol=1e-5)


@pytest.mark.parametrize("slope", [None, 0.01])
def test_instance_norm_and_its_gradients_equal_the_definition_differentiated(slope):
    def definition(x, scale, shift):
        mean, var = x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True)
        y = (x - mean) / jnp.sqrt(var + 1e-5) * scale + shift
        return y if slope is None else jax.nn.leaky_relu(y, slope)

    arguments = 3 + 2 * draw(0, 2, 3, 4, 5, 6), draw(1, 6), draw(2, 6)
    ours = value_and_gradients(lambda *a: instance_norm(*a, negative_slope=slope), *arguments)
    theirs = value_and_gradients(definition, *arguments)
    assert max(map(relative_error, ours, theirs)) < 1e-5


def test_instance_norm_of_one_voxel_is_its_shift_and_passes_no_gradient_back():
    x, scale, shift = draw(0, 2, 1, 1, 1, 4), draw(1, 4), draw(2, 4)
    y, g_x, g_scale, _ = value_and_gradients(lambda *a: instance_norm(*a), x, scale, shift)
    np.testing.assert_array_equal(y[:, 0, 0, 0], jnp.broadcast_to(shift, (2, 4)))
    assert not g_x.any()
    assert not g_scale.any()


def test_instance_norm_keeps_float32_statistics_in_half_precision():
    x = (1000 + draw(0, 1, 4, 4, 4, 2)).astype(jnp.bfloat16)
    y = instance_norm(x, jnp.ones(2), jnp.zeros(2))
    expected = instance_norm(x.astype(jnp.float32), jnp.ones(2), jnp.zeros(2))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=2e-2)


def test_the_backward_pass_of_instance_norm_keeps_one_array_of_the_size_of_its_input():
    x = draw(0, 2, 4, 4, 4, 8)
    _, pullback = jax.vjp(lambda x: instance_norm(x, jnp.ones(8), jnp.zeros(8), negative_slope=0.01), x)
    assert sum(a.size >= x.size for a in jax.tree.leaves(pullback)) == 1


def test_the_compiler_takes_our_options_on_this_machine():
    jax.jit(lambda x: x.sum()).lower(jnp.ones(3)).compile(compiler_options=compiler_options(jax.default_backend()))
