"""Rematerialisation changes what the backward pass keeps, and no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgps_jax.architecture import Architecture
from pgps_jax.models import build
from pgps_jax.models.conv import instance_norm

K3, S1, S2 = (3, 3, 3), (1, 1, 1), (2, 2, 2)
BACKBONES = {
    "plain-unet": Architecture("plain-unet", (4, 6, 8), (K3,) * 3, (S1, S2, S2), (2,) * 3, (2,) * 2),
    "resenc-unet": Architecture("resenc-unet", (4, 6, 8), (K3,) * 3, (S1, S2, S2), (1, 2, 2), (1,) * 2),
    "unetr": Architecture(
        "unetr", options={"feature_size": 4, "hidden_size": 8, "mlp_dim": 16, "num_heads": 2, "table_size": (32, 32, 32)}
    ),
    "swin-unetr": Architecture("swin-unetr", options={"feature_size": 12, "depths": (1, 1, 1, 1), "window_size": 3}),
}


def objective(architecture: Architecture, remat: bool):
    """A loss as a function of (parameters, image), and the parameters' shapes."""
    net = nnx.eval_shape(lambda: build(architecture, 1, 2, remat=remat, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(net, nnx.Param)
    return lambda params, x: sum(jnp.square(y).mean() for y in nnx.merge(graphdef, params)(x)), params


def kept_bytes(function, *args) -> int:
    """Bytes that the backward pass of a function is given, its arguments not counted."""
    pullback = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args)
    given, kept = (sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) for tree in (args, pullback))
    return kept - given


@pytest.mark.parametrize("name", BACKBONES)
def test_less_than_half_is_kept_for_the_backward_pass(name):
    image = jax.ShapeDtypeStruct((2, 32, 32, 32, 1), jnp.float32)
    kept = []
    for remat in (False, True):
        loss, params = objective(BACKBONES[name], remat)
        kept.append(kept_bytes(loss, params, image))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("name", ["plain-unet", "resenc-unet"])
def test_gradients_are_the_same(name, run_quickly):
    image = jax.random.normal(jax.random.key(0), (1, 8, 8, 8, 1))
    gradients = []
    for remat in (False, True):
        loss, shapes = objective(BACKBONES[name], remat)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda p, rng=rng: jnp.asarray(rng.normal(0, 0.2, p.shape), p.dtype), shapes)
        gradients.append(run_quickly(jax.grad(loss), params, image))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max()), *gradients)


def test_a_norm_with_its_leaky_relu_keeps_its_input_and_the_statistics_only():
    x, scale = jax.ShapeDtypeStruct((2, 8, 8, 8, 16), jnp.bfloat16), jax.ShapeDtypeStruct((16,), jnp.float32)
    kept = kept_bytes(lambda x, scale, shift: instance_norm(x, scale, shift, negative_slope=0.01), x, scale, scale)
    assert kept <= 2 * 2 * 16 * 4  # mean and standard deviation of each sample and channel, float32
