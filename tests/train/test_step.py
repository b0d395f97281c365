"""One training step: the same numbers when its batch is computed in parts, and for losses that join the patches of a batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgps_jax.data.labels import Labels
from pgps_jax.data.pipeline import PatchBatch
from pgps_jax.train.augment import AugmentConfig, crop_size, make_policy
from pgps_jax.train.optim import OptimConfig, make_optimizer
from pgps_jax.train.state import init_state, split
from pgps_jax.train.step import make_train_step, make_validation_step

PATCH = (8, 8, 8)
LABELS = Labels(("background", "a", "b"), (0, 1, 2))


class TwoHeads(nnx.Module):
    """Logits at full and at half resolution."""

    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = nnx.Linear(2, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        features = jnp.tanh(self.first(x))
        return self.second(features), self.second(features[:, ::2, ::2, ::2])


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("labels", [LABELS, dataclasses.replace(LABELS, values=(0, 1), names=("background", "a"), ignore=2)])
def test_a_batch_in_parts_gives_the_step_of_the_whole_batch(batch_dice, labels):
    policy = make_policy(AugmentConfig("none"), PATCH)
    rng, crop = np.random.default_rng(0), crop_size(policy, PATCH)
    batch = PatchBatch(rng.normal(size=(6, *crop, 2)).astype(np.float32), rng.integers(-1, 3, (6, *crop)).astype(np.int8))
    graphdef, params = split(TwoHeads(nnx.Rngs(0)))
    optimizer = make_optimizer(OptimConfig())

    def after_two_steps(parts):
        step = jax.jit(make_train_step(graphdef, optimizer, labels, batch_dice, policy, PATCH, seed=1, parts=parts))
        state, first = step(init_state(params, optimizer), batch, jnp.float32(0.1))
        state, second = step(state, batch, jnp.float32(0.1))
        return state, first, second

    whole = after_two_steps(1)
    for parts in (2, 6):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after_two_steps(parts), whole)


def test_validation_in_parts_counts_the_same_voxels():
    rng = np.random.default_rng(0)
    batch = PatchBatch(rng.normal(size=(6, *PATCH, 2)).astype(np.float32), rng.integers(-1, 3, (6, *PATCH)).astype(np.int8))
    graphdef, params = split(TwoHeads(nnx.Rngs(0)))
    whole, parts = (jax.jit(make_validation_step(graphdef, LABELS, True, n))(params, batch) for n in (1, 3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), parts, whole)
