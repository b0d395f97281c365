"""The plain U-Net computes what nnU-Net's does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgps_jax.architecture import Architecture, PatchLimits
from pgps_jax.errors import InputError
from pgps_jax.models import BACKBONES, build, limits, lowest_head

HIPPOCAMPUS = Architecture(
    "plain-unet", (32, 64, 128, 256), ((3, 3, 3),) * 4, ((1, 1, 1),) + ((2, 2, 2),) * 3, (2,) * 4, (2,) * 3
)
TINY = Architecture(
    "plain-unet", (4, 6, 8), ((1, 3, 3), (3, 3, 3), (3, 3, 3)), ((1, 1, 1), (1, 2, 2), (2, 2, 2)), (2,) * 3, (2,) * 2
)


def test_all_heads_and_gradients_equal_nnunets(peer_network):
    peer = peer_network("plain_iso")
    assert peer.forward_error() <= 1e-5
    assert peer.gradient_error() <= 1e-4


def test_all_heads_and_gradients_of_an_anisotropic_network_equal_nnunets(peer_network):
    """In float32 an activation lies so near zero that the order of a sum decides on which side of the leaky ReLU it is."""
    peer = peer_network("plain_anisotropic", gradients="plain_anisotropic_float64")
    assert peer.forward_error() <= 1e-5
    with jax.enable_x64(True):
        assert peer.gradient_error(jnp.float64) <= 1e-5


def test_the_smallest_patch_with_a_one_voxel_bottleneck_equals_nnunets(peer_network):
    peer = peer_network("plain_iso_one_voxel_bottleneck", weights="plain_iso")
    assert peer.forward_error() <= 1e-5
    assert peer.gradient_error() <= 1e-4


@pytest.mark.parametrize("name", ["plain_iso", "plain_anisotropic"])
def test_bfloat16_with_random_weights_stays_as_near_float32_as_it_can(peer_network, name):
    """These weights enlarge what rounding leaves: PyTorch's own bfloat16 autocast is 1.9e-2 and 2.0e-2 off with them."""
    assert peer_network(name).half_precision_error() <= 2.5e-2


def test_bfloat16_stays_near_float32(bfloat16_error):
    assert bfloat16_error(TINY) <= 2e-2


def test_a_fresh_network_has_nnunets_shapes_and_distributions(initial_statistics, fresh):
    net = fresh(lambda: build(HIPPOCAMPUS, 1, 3, rngs=nnx.Rngs(0)))
    found = initial_statistics(net, "Dataset004_Hippocampus/nnUNetPlans")
    assert found.shapes == found.peer_shapes
    assert found.wrong == []


@pytest.mark.parametrize(
    ("features", "classes", "count"),
    [((32, 64, 128, 256), 3, 5_603_177), ((32, 64, 128, 256, 320, 320), 2, 31_195_594)],
)
def test_parameter_counts_are_nnunets(features, classes, count):
    n = len(features)
    architecture = Architecture(
        "plain-unet", features, ((3, 3, 3),) * n, ((1, 1, 1),) + ((2, 2, 2),) * (n - 1), (2,) * n, (2,) * (n - 1)
    )
    net = nnx.eval_shape(lambda: build(architecture, 1, classes, rngs=nnx.Rngs(0)))
    assert sum(np.prod(p.shape) for p in jax.tree.leaves(nnx.state(net, nnx.Param))) == count


def test_without_deep_supervision_only_the_full_resolution_head_answers(run_quickly, fresh):
    net = fresh(lambda: build(TINY, 2, 3, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, 4, 8, 8, 2))
    every = run_quickly(net, x)
    assert [y.shape for y in every] == [(2, 4, 8, 8, 3), (2, 4, 4, 4, 3)]
    (single,) = run_quickly(lambda x: net(x, deep_supervision=False), x)
    np.testing.assert_allclose(single, every[0], atol=1e-6)


def test_limits_are_the_product_of_the_strides_and_the_smallest_patch_runs(run_quickly, fresh):
    assert limits(HIPPOCAMPUS) == PatchLimits((8, 8, 8), (8, 8, 8))
    assert limits(TINY) == PatchLimits((2, 4, 4), (2, 4, 4))
    net = fresh(lambda: build(TINY, 1, 2, rngs=nnx.Rngs(0)))
    (logits,) = run_quickly(lambda x: net(x, deep_supervision=False), jnp.ones((1, *limits(TINY).smallest, 1)))
    assert logits.shape == (1, 2, 4, 4, 2)
    assert jnp.isfinite(logits).all()


def test_the_lowest_head_names_parameters_that_only_the_coarsest_logits_use(run_quickly, fresh):
    net = fresh(lambda: build(TINY, 1, 2, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(net, nnx.Param)
    x = jax.random.normal(jax.random.key(0), (1, 2, 4, 4, 1))
    gradient = nnx.to_pure_dict(run_quickly(jax.grad(lambda p: nnx.merge(graphdef, p)(x)[-1].sum()), params))
    for part in lowest_head(TINY):
        gradient = gradient[part]
    assert all(jnp.abs(g).max() > 0 for g in gradient.values())
    assert lowest_head(dataclasses.replace(TINY, features_per_stage=(4, 6))) is None


def test_biases_that_a_norm_takes_away_change_nothing(run_quickly, fresh):
    net = fresh(lambda: build(TINY, 1, 2, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (1, 4, 8, 8, 1))
    before = run_quickly(net, x)
    net.encoder.stages[1][0].convs[0].conv.bias[...] = jnp.arange(6.0)
    assert all((a == b).all() for a, b in zip(before, run_quickly(net, x), strict=True))


def test_an_unknown_backbone_is_refused_with_the_known_names():
    with pytest.raises(InputError, match=r"'vnet'.*plain-unet"):
        build(dataclasses.replace(TINY, backbone="vnet"), 1, 2, rngs=nnx.Rngs(0))
    assert {"plain-unet", "resenc-unet"} <= set(BACKBONES)
