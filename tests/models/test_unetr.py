"""UNETR computes what MONAI's does, at any patch that is a multiple of 16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgps_jax.architecture import Architecture, PatchLimits
from pgps_jax.errors import InputError
from pgps_jax.models import build, limits
from pgps_jax.models.attention import Linear, PatchEmbedding
from pgps_jax.models.unetr import Convolution, PositionedEmbedding, TransposedConvolution, UnetrOptions

SMALL = {"feature_size": 4, "hidden_size": 8, "mlp_dim": 8, "num_heads": 2, "table_size": (32, 32, 16)}


def small(**changes) -> Architecture:
    return Architecture("unetr", options=SMALL | changes)


def test_output_and_gradients_equal_monais(monai_network):
    peer = monai_network("monai_unetr")
    assert sum(p.size for p in jax.tree.leaves(peer.params)) == peer.about["num_parameters"]
    errors = peer.errors()
    assert len(errors) == 5
    assert errors.pop("output_0").largest <= 2e-5
    assert max(error.largest for error in errors.values()) <= 1e-3, errors


def test_in_float64_gradients_equal_monais_to_its_rounding(monai_network):
    with jax.enable_x64(True):
        errors = monai_network("monai_unetr", jnp.float64).errors()
    assert max(error.largest for error in errors.values()) <= 1e-5, errors


def test_bfloat16_stays_near_float32(monai_network):
    assert monai_network("monai_unetr", jnp.bfloat16).forward_error().rms <= 2e-2


def test_the_smallest_patch_is_one_token_and_runs(filled, run_quickly):
    assert limits(small()) == PatchLimits((16, 16, 16), (16, 16, 16))
    net = filled(lambda: build(small(), 1, 2, rngs=nnx.Rngs(0)))
    (logits,) = run_quickly(lambda x: net(x, deep_supervision=True), jnp.ones((2, 16, 16, 16, 1)))
    assert logits.shape == (2, 16, 16, 16, 2)
    assert jnp.isfinite(logits).all()
    assert np.ptp(logits) > 0


def test_the_position_table_is_interpolated_to_the_patch(filled):
    embedding = filled(lambda: PositionedEmbedding(UnetrOptions(**SMALL), 1, rngs=nnx.Rngs(0)))
    embedding.position_embeddings[...] = jnp.arange(4.0)[None, :, None] * jnp.ones(8)

    def positions(*patch):
        x = jnp.zeros((1, *patch, 1))
        return np.asarray(embedding(x) - embedding.patch_embeddings(x))[0, ..., 0, 0]

    np.testing.assert_allclose(positions(32, 32, 16), [[0, 1], [2, 3]], atol=1e-6)  # as it is
    np.testing.assert_allclose(positions(16, 16, 16), [[1.5]], atol=1e-6)  # the mean
    np.testing.assert_allclose(positions(32, 64, 16), [[0, 0.25, 0.75, 1], [2, 2.25, 2.75, 3]], atol=1e-6)


def test_fresh_parameters_have_pytorchs_distributions():
    rngs = nnx.Rngs(0)
    uniform = {
        8192: PatchEmbedding(2, 16, (16, 16, 16), rngs=rngs).kernel,
        64: Linear(64, 64, rngs=rngs).kernel,
        16 * 27: Convolution(16, 16, 3, rngs=rngs).conv.kernel,
        8 * 8: TransposedConvolution(16, 8, rngs=rngs).conv.kernel,
    }
    for fan_in, kernel in uniform.items():
        assert np.abs(kernel).max() <= fan_in**-0.5
        assert np.std(kernel) == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)
    options = UnetrOptions(hidden_size=192, table_size=(32, 32, 32))
    table = PositionedEmbedding(options, 1, rngs=rngs).position_embeddings
    assert np.std(table) == pytest.approx(0.02, rel=0.1)


def test_what_it_cannot_take_is_said():
    with pytest.raises(InputError, match="multiple of 16"):
        nnx.eval_shape(lambda: build(small(), 1, 2, rngs=nnx.Rngs(0))(jnp.ones((1, 16, 24, 16, 1))))
    with pytest.raises(InputError, match=r"no option depth; it has: feature_size"):
        build(small(depth=3), 1, 2, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="num_heads"):
        build(small(num_heads=3), 1, 2, rngs=nnx.Rngs(0))
