"""Computing in bfloat16 trains as computing in float32 does."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgps_jax.architecture import Architecture
from pgps_jax.data.labels import Labels
from pgps_jax.data.pipeline import PatchBatch
from pgps_jax.data.synthetic import phantom
from pgps_jax.models import build
from pgps_jax.train.augment import AugmentConfig, crop_size, make_policy
from pgps_jax.train.optim import OptimConfig, make_optimizer
from pgps_jax.train.state import init_state, split
from pgps_jax.train.step import make_train_step

STEPS = 80
PATCH = (16, 16, 16)
LABELS = Labels(("background", "organ", "lesion"), (0, 1, 2))
K3 = (3, 3, 3)
NETWORK = Architecture("plain-unet", (4, 8, 16), (K3,) * 3, ((1, 1, 1), (2, 2, 2), (2, 2, 2)), (2,) * 3, (2,) * 2)


def batches(crop):
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        images, labels = zip(*(phantom(rng, crop) for _ in range(2)), strict=True)
        images = [(image - image.mean()) / image.std() for image in images]
        yield PatchBatch(jnp.asarray(np.stack(images)[..., None], jnp.float32), jnp.asarray(np.stack(labels), jnp.int8))


def losses(fresh, dtype) -> np.ndarray:
    """Loss of every step of a training on phantoms; all but the type of computation is the same."""
    graphdef, params = split(fresh(lambda: build(NETWORK, 1, 3, dtype=dtype, rngs=nnx.Rngs(0))))
    optimizer, policy = make_optimizer(OptimConfig()), make_policy(AugmentConfig(preset="none"), PATCH)
    step = jax.jit(make_train_step(graphdef, optimizer, LABELS, True, policy, PATCH, 0))
    state, curve = init_state(params, optimizer), []
    for batch in batches(crop_size(policy, PATCH)):
        state, metrics = step(state, batch, jnp.float32(0.01))
        curve.append(float(metrics.loss))
    return np.asarray(curve)


def test_the_training_curve_in_bfloat16_is_that_of_float32(fresh):
    full, half = losses(fresh, jnp.float32), losses(fresh, jnp.bfloat16)
    assert full[-20:].mean() < full[:20].mean() - 0.3, "the network of this test must learn something"
    assert not np.array_equal(full, half)
    smooth = lambda curve: np.convolve(curve, np.full(10, 0.1), "valid")  # noqa: E731
    assert np.abs(smooth(half) - smooth(full)).max() <= 0.01
    assert abs(half[-20:].mean() - full[-20:].mean()) <= 0.005
