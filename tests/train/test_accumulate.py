"""Chunks give the gradient of the whole batch, whatever the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgps_jax.train.accumulate import accumulated_value_and_grad


def forward(params, images):
    """Two outputs of different size, as with deep supervision."""
    features = jnp.tanh(images @ params["first"])
    return features @ params["second"], features[:, ::2, ::2, ::2] @ params["second"]


def batch_dice(logits):
    """A loss that does not split over the batch."""
    full, half = (jax.nn.softmax(x) for x in logits)
    return -full[..., 0].sum() / (full**2).sum() - (half[..., 1] ** 3).sum() / half.sum()


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    params = {"first": jnp.array(rng.normal(size=(3, 5)), jnp.float32), "second": jnp.array(rng.normal(size=(5, 2)), jnp.float32)}
    return params, jnp.array(rng.normal(size=(6, 4, 4, 4, 3)), jnp.float32)


@pytest.mark.parametrize("chunks", [1, 2, 3, 6])
def test_chunks_give_the_numbers_of_the_whole_batch(problem, chunks):
    params, images = problem
    value, gradient = jax.jit(lambda p, x: accumulated_value_and_grad(forward, batch_dice, p, x, chunks))(params, images)
    whole, expected = jax.value_and_grad(lambda p: batch_dice(forward(p, images)))(params)
    assert float(value) == pytest.approx(float(whole), rel=1e-6)
    for name in params:
        np.testing.assert_allclose(gradient[name], expected[name], rtol=1e-5, atol=1e-7)


def test_chunks_take_every_nth_patch_so_that_devices_share_each_of_them(problem):
    params, images = problem
    seen = []

    def watched(params, part):
        seen.append(part)
        return forward(params, part)

    accumulated_value_and_grad(watched, batch_dice, params, images, 3)
    for i, part in enumerate(seen[:3]):
        np.testing.assert_array_equal(part, images[i::3])


def test_a_batch_that_cannot_be_cut_evenly_is_refused(problem):
    params, images = problem
    with pytest.raises(ValueError, match="6 cannot be cut into 4"):
        accumulated_value_and_grad(forward, batch_dice, params, images, 4)
