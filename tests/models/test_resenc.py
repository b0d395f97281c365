"""The residual-encoder U-Net computes what nnU-Net's does."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgps_jax.architecture import Architecture
from pgps_jax.models import build


def planned(features: tuple[int, ...], blocks: tuple[int, ...]) -> Architecture:
    n = len(features)
    strides = ((1, 1, 1),) + ((2, 2, 2),) * (n - 1)
    return Architecture("resenc-unet", features, ((3, 3, 3),) * n, strides, blocks, (1,) * (n - 1))


def test_all_heads_and_gradients_equal_nnunets(peer_network):
    peer = peer_network("resenc")
    assert peer.forward_error() <= 1e-5
    assert peer.gradient_error() <= 1e-4


def test_bfloat16_with_random_weights_stays_near_float32(peer_network):
    assert peer_network("resenc").half_precision_error() <= 2e-2


def test_bfloat16_stays_near_float32(bfloat16_error):
    assert bfloat16_error(planned((4, 8, 8), (1, 2, 1))) <= 2e-2


def test_a_fresh_network_has_nnunets_shapes_and_distributions(initial_statistics, fresh):
    architecture = planned((32, 64, 128, 256), (1, 3, 4, 6))
    net = fresh(lambda: build(architecture, 1, 3, rngs=nnx.Rngs(0)))
    found = initial_statistics(net, "Dataset004_Hippocampus/nnUNetResEncUNetMPlans")
    assert found.shapes == found.peer_shapes
    assert found.wrong == []


def test_the_parameter_count_is_nnunets():
    architecture = planned((32, 64, 128, 256, 320, 320), (1, 3, 4, 6, 6, 6))
    net = nnx.eval_shape(lambda: build(architecture, 1, 2, rngs=nnx.Rngs(0)))
    assert sum(np.prod(p.shape) for p in jax.tree.leaves(nnx.state(net, nnx.Param))) == 102_349_770


def test_a_fresh_block_is_its_skip(run_quickly, fresh):
    net = fresh(lambda: build(planned((4, 4), (2, 1)), 1, 2, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 4, 4))
    np.testing.assert_array_equal(run_quickly(net.encoder.stages[0].blocks[1], x), jnp.where(x > 0, x, 0.01 * x))
