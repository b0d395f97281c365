"""Blocks do what their names say and start as nnU-Net's do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgps_jax.models.blocks import AveragePool, Conv, ConvNormAct, ResidualBlock, TransposedConv


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (lambda rngs: Conv(8, 32, (3, 3, 3), rngs=rngs), 8 * 27),
        # PyTorch's fan-in of a transposed convolution counts its output channels
        (lambda rngs: TransposedConv(32, 24, (2, 2, 2), rngs=rngs), 24 * 8),
    ],
)
def test_kernels_start_he_normal_and_biases_zero(layer, fan_in):
    layer = layer(nnx.Rngs(0))
    kernel = np.asarray(layer.kernel[...])
    std = math.sqrt(2 / (1 + 1e-4) / fan_in)
    assert abs(kernel.std() - std) < 4 * std / math.sqrt(2 * kernel.size)
    assert abs(kernel.mean()) < 4 * std / math.sqrt(kernel.size)
    assert not layer.bias[...].any()


def test_average_pool_is_the_mean_of_each_block():
    x = jnp.arange(2 * 4 * 2 * 4 * 3.0).reshape(2, 4, 2, 4, 3)
    expected = x.reshape(2, 2, 2, 2, 1, 2, 2, 3)
    expected = np.asarray(expected).mean((2, 4, 6))
    np.testing.assert_allclose(AveragePool((2, 1, 2))(x), expected)


def test_a_residual_block_has_a_projection_only_where_channels_change():
    same = ResidualBlock(4, 4, (1, 3, 3), (1, 2, 2), rngs=nnx.Rngs(0))
    wider = ResidualBlock(4, 6, (1, 3, 3), rngs=nnx.Rngs(0))
    assert [type(part).__name__ for part in same.skip] == ["AveragePool"]
    assert [type(part).__name__ for part in wider.skip] == ["ConvNormAct"]
    assert wider.skip[0].conv.bias is None


def test_parameters_stay_float32_in_a_half_precision_block():
    block = ConvNormAct(2, 4, (1, 1, 1), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert block(jnp.ones((1, 2, 2, 2, 2))).dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(nnx.state(block, nnx.Param))} == {jnp.dtype("float32")}
