"""What is not rounded: logits of half-precision networks, and float32 on accelerators. Programs for those are only read."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgps_jax.architecture import Architecture
from pgps_jax.models import build
from pgps_jax.models.attention import PatchEmbedding
from pgps_jax.models.conv import _conv_native, _conv_padded_channels, logits

K3 = (3, 3, 3)
CONVS = ((4, 8, 12), (K3,) * 3, ((1, 1, 1), (2, 2, 2), (2, 2, 2)), (1,) * 3, (1,) * 2)
UNETR = {"feature_size": 4, "hidden_size": 12, "mlp_dim": 8, "num_heads": 2, "table_size": (16, 16, 32)}
NETWORKS = {
    "plain-unet": (Architecture("plain-unet", *CONVS), 8),
    "resenc-unet": (Architecture("resenc-unet", *CONVS), 8),
    "unetr": (Architecture("unetr", options=UNETR), 16),
    "swin-unetr": (Architecture("swin-unetr", options={"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}), 32),
}


def step(name: str, dtype):
    """(gradients of a network's outputs by parameters and image, its outputs) as a function, and abstract arguments."""
    architecture, size = NETWORKS[name]
    graphdef, params = nnx.split(nnx.eval_shape(lambda: build(architecture, 1, 3, dtype=dtype, rngs=nnx.Rngs(0))), nnx.Param)

    def run(params, x):
        def total(params, x):
            outputs = nnx.merge(graphdef, params)(x)
            return sum(y.sum() for y in outputs), outputs

        return jax.grad(total, (0, 1), has_aux=True)(params, x)

    return run, params, jax.ShapeDtypeStruct((1, size, size, size, 1), jnp.float32)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_of_all_heads_are_float32_whatever_computes(name):
    run, *arguments = step(name, jnp.bfloat16)
    (gradients, image_gradient), outputs = jax.eval_shape(run, *arguments)
    assert {y.dtype for y in outputs} == {jnp.dtype(jnp.float32)}
    assert {g.dtype for g in jax.tree.leaves((gradients, image_gradient))} == {jnp.dtype(jnp.float32)}


def products(program: str) -> list[str]:
    return [line for line in program.splitlines() if "stablehlo.dot_general" in line or "stablehlo.convolution" in line]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_float32_network_and_its_gradients_keep_all_bits_on_accelerators(name, platform):
    run, *arguments = step(name, jnp.float32)
    found = products(jax.jit(run).trace(*arguments).lower(lowering_platforms=(platform,)).as_text())
    assert len(found) > 10
    assert not [line for line in found if line.count("HIGHEST") != 2]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", ["plain-unet", "resenc-unet"])
def test_a_bfloat16_unet_multiplies_nothing_but_bfloat16(name, platform):
    run, *arguments = step(name, jnp.bfloat16)
    found = products(jax.jit(run).trace(*arguments).lower(lowering_platforms=(platform,)).as_text())
    assert len(found) > 10
    assert not [line for line in found if not re.search(r": \(tensor<\w*xbf16>, tensor<\w*xbf16>\) ->", line)]


def test_logits_of_half_precision_features_are_added_up_and_given_in_float32(run_quickly):
    x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 3, 4, 5, 32), (32, 3)]))
    half = x.astype(jnp.bfloat16)
    found = run_quickly(logits, half, kernel)
    exact = np.tensordot(np.float64(half), np.float64(kernel.astype(jnp.bfloat16)), axes=1)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, atol=1e-5)
    assert np.abs(np.asarray(found.astype(jnp.bfloat16), np.float64) - exact).max() > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_gradients_of_logits_are_those_of_a_matrix_product(run_quickly, dtype, tolerance):
    x, kernel, g = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 3, 4, 5, 8), (8, 3), (2, 3, 4, 5, 3)]))
    g_x, g_kernel = run_quickly(lambda x, k: jax.vjp(logits, x, k)[1](g), x.astype(dtype), kernel)
    expected = run_quickly(lambda x, k: jax.vjp(lambda x, k: x @ k, x, k)[1](g), x, kernel)
    assert (g_x.dtype, g_kernel.dtype) == (dtype, jnp.float32)
    for ours, theirs in zip((g_x, g_kernel), expected, strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=tolerance * float(jnp.abs(theirs).max()))


def test_the_embedding_of_patches_is_float32_for_half_precision_images():
    found = nnx.eval_shape(lambda: PatchEmbedding(1, 8, (2, 2, 2), rngs=nnx.Rngs(0))(jnp.ones((1, 4, 4, 4, 1), jnp.bfloat16)))
    assert found.dtype == jnp.float32


def convolved(function, *args) -> list[list[tuple[int, ...]]]:
    """Shapes of image and kernel of every convolution in a function."""
    eqns = jax.make_jaxpr(function)(*args).eqns
    return [[v.aval.shape for v in e.invars] for e in eqns if e.primitive.name == "conv_general_dilated"]


@pytest.mark.parametrize(("channels", "stride"), [((1, 12), (1, 1, 1)), ((12, 20), (1, 1, 1)), ((20, 12), (2, 2, 2)), ((16, 8), (1, 1, 1))])
def test_convolutions_for_cudnn_have_channels_of_multiples_of_8_in_half_precision_and_the_same_numbers(channels, stride):
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 6, channels[0])).astype(jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, *channels)).astype(jnp.bfloat16)

    def gradients(convolve):
        def run(x, kernel):
            y, pull_back = jax.vjp(lambda x, k: convolve(x, k, stride=stride), x, kernel)
            return y, *pull_back(jnp.ones_like(y))

        return run

    found, odd = convolved(gradients(_conv_padded_channels), x, kernel), {n for n in channels if n % 8}
    assert len(found) == 3
    assert not [shape for shapes in found for shape in shapes if odd & set(shape)]
    for ours, theirs in zip(*(jax.jit(gradients(c))(x, kernel) for c in (_conv_padded_channels, _conv_native)), strict=True):
        assert ours.shape == theirs.shape
        ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
        np.testing.assert_allclose(ours, theirs, atol=1e-2 * float(jnp.abs(theirs).max()))


def test_float32_convolutions_for_cudnn_stay_as_they_are():
    x, kernel = jnp.ones((1, 2, 2, 2, 1)), jnp.ones((3, 3, 3, 1, 3))
    assert convolved(lambda x, k: _conv_padded_channels(x, k, stride=(1, 1, 1)), x, kernel) == [[x.shape, kernel.shape]]
