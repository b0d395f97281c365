"""Validation batches are the planned ones as far as training has room for them."""

import pytest

from pgps_jax.curriculum import Stage
from pgps_jax.train.online_validation import validation_stage

PATCH = (16, 16, 16)


@pytest.mark.parametrize("trained, devices, batch, parts", [
    (Stage(3, PATCH, 8), 1, 8, 1),
    (Stage(3, PATCH, 4), 1, 4, 1),  # halved
    (Stage(3, PATCH, 8, 4), 2, 8, 4),  # in parts, or in more of them
    (Stage(3, PATCH, 30), 1, 8, 1),  # filling the device does not change what is validated
    (Stage(3, PATCH, 30), 3, 6, 1),
    (Stage(3, PATCH, 30), 10, 10, 1),
])
def test_a_validation_batch_is_the_planned_one_or_what_training_takes_of_it(trained, devices, batch, parts):
    assert validation_stage(trained, 8, devices) == Stage(0, PATCH, batch, parts)
