"""Five training steps equal PyTorch's, and the learning rate is nnU-Net's of every step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pgps_jax.architecture import Architecture
from pgps_jax.data.dataset import Labels
from pgps_jax.models import build, lowest_head
from pgps_jax.train.losses import segmentation_loss
from pgps_jax.train.optim import OptimConfig, clip_by_torch_norm, learning_rate_of_step, make_optimizer

NETWORK = Architecture(
    "plain-unet", (8, 16, 24), ((3, 3, 3),) * 3, ((1, 1, 1), (2, 2, 2), (2, 2, 2)), (2, 2, 2), (2, 2)
)
LABELS = Labels(("background", "one", "two"), (0, 1, 2), None, None)


def from_torch(arrays: dict, prefix: str, params: dict, path: tuple = ()) -> dict:
    """The golden parameters in the shape of our parameter tree, found by their PyTorch names."""
    if isinstance(params, dict):
        return {key: from_torch(arrays, prefix, value, (*path, str(key))) for key, value in params.items()}
    names = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    value = arrays[f"{prefix}:{'.'.join(path[:-1])}.{names[path[-1]]}"]
    if value.ndim == 5:  # torch: (out, in, d, h, w), transposed convolutions (in, out, d, h, w)
        value = value.transpose(2, 3, 4, 0, 1) if "transpconvs" in path else value.transpose(2, 3, 4, 1, 0)
    return jnp.asarray(value)


@pytest.mark.parametrize("name", ["five_steps", "five_steps_clipped"])
def test_five_training_steps_equal_pytorchs(golden, name):
    arrays, sidecar = golden(f"optim/{name}")
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(NETWORK, 2, 3, rngs=nnx.Rngs(0))), nnx.Param)
    params = from_torch(arrays, "init", nnx.to_pure_dict(state))
    optimizer = make_optimizer(OptimConfig(), lowest_head(NETWORK))
    opt_state = optimizer.init(params)
    rates = learning_rate_of_step(OptimConfig(), num_steps=sidecar["epochs_in_schedule"], steps_per_epoch=1)

    @jax.jit
    def step(params, opt_state, rate, x, y):
        def objective(params):
            return segmentation_loss(nnx.merge(graphdef, params)(x), y, LABELS, sidecar["batch_dice"])

        loss, gradients = jax.value_and_grad(objective)(params)
        directions, opt_state = optimizer.update(gradients, opt_state, params)
        params = jax.tree.map(lambda p, d: p - rate * d, params, directions)
        return params, opt_state, loss, optax.global_norm(gradients)

    for i in range(5):
        x = jnp.asarray(np.moveaxis(arrays[f"x_{i}"], 1, -1))
        y = jnp.asarray(arrays[f"y_{i}"][:, 0])
        params, opt_state, loss, norm = step(params, opt_state, rates[i], x, y)
        np.testing.assert_allclose(float(loss), sidecar["losses_float64"][i], rtol=0, atol=1e-4)
        np.testing.assert_allclose(float(norm), sidecar["grad_norms_float64"][i], rtol=1e-3)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5),
        params, from_torch(arrays, "final", params),
    )
    before = from_torch(arrays, "init", params)["decoder"]["seg_layers"][0]
    jax.tree.map(np.testing.assert_array_equal, params["decoder"]["seg_layers"][0], before)  # not even decayed


def test_the_first_direction_is_the_decayed_gradient_times_one_plus_momentum():
    config = OptimConfig(momentum=0.9, weight_decay=0.1, clip_norm=1e9)
    optimizer = make_optimizer(config)
    w, g = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([0.5, 3.0])}
    direction, state = optimizer.update(g, optimizer.init(w), w)
    decayed = np.array([0.6, 2.8])
    np.testing.assert_allclose(direction["w"], 1.9 * decayed, rtol=1e-6)
    direction, _ = optimizer.update(g, state, w)
    np.testing.assert_allclose(direction["w"], decayed + 0.9 * 1.9 * decayed, rtol=1e-6)


def test_long_gradients_are_cut_and_short_ones_left_alone():
    clip = clip_by_torch_norm(12.0)
    long, short = {"a": jnp.full(4, 30.0)}, {"a": jnp.full(4, 3.0)}
    np.testing.assert_allclose(clip.update(long, clip.init(long))[0]["a"], 30 * 12 / (60 + 1e-6), rtol=1e-7)
    np.testing.assert_array_equal(clip.update(short, clip.init(short))[0]["a"], short["a"])


def test_poly_learning_rate_equals_nnunets(golden):
    _, sidecar = golden("optim/poly_lr")
    rates = learning_rate_of_step(OptimConfig(), num_steps=1000 * 250, steps_per_epoch=250)
    assert rates.shape == (250_000,)
    assert rates.dtype == np.float32
    for epoch, rate in sidecar["lr"].items():
        assert set(rates[int(epoch) * 250 : (int(epoch) + 1) * 250]) == {np.float32(rate)}


def test_the_learning_rate_can_fall_at_every_step_to_almost_nothing():
    rates = learning_rate_of_step(OptimConfig(), num_steps=3000, steps_per_epoch=1)
    assert rates[0] == np.float32(0.01) and (np.diff(rates) < 0).all() and rates[-1] < 1e-5


def test_learning_rate_follows_the_batch_size_only_when_asked():
    batches = np.repeat([72, 18, 9], 10)
    plain = learning_rate_of_step(OptimConfig(), 30, 10)
    for rule, factor in (("none", 1), ("sqrt", np.sqrt(batches / 9)), ("linear", batches / 9)):
        rates = learning_rate_of_step(OptimConfig(batch_rule=rule), 30, 10, batches, 9)
        np.testing.assert_allclose(rates, plain * factor, rtol=1e-6)


def test_warm_up_starts_anew_only_when_a_stage_is_first_entered():
    stages = np.array([0, 0, 0, 0, 1, 1, 1, 1, 0, 0])
    config = OptimConfig(warmup_steps=2)
    rates = learning_rate_of_step(config, 10, 10, stage_of_step=stages) / learning_rate_of_step(OptimConfig(), 10, 10)
    np.testing.assert_allclose(rates, [0.5, 1, 1, 1, 0.5, 1, 1, 1, 1, 1], rtol=1e-6)
